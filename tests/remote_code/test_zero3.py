"""Adapters under DeepSpeed's ZeRO-3 learn and are saved as in one process. Skipped where DeepSpeed is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import CAUSAL_LM, fill_adapter, logits, tiny_base, tiny_config, token_ids
from torch import distributed

METHODS = ("dora", "mixlora")
STEPS = 4


def build(method: str):
    # The balance loss is not the mean of its values on two halves of a batch.
    changes = {"router_aux_loss_coef": 0.0} if method == "mixlora" else {}
    model = CAUSAL_LM[method].from_base(tiny_base(), tiny_config(method, **changes))
    fill_adapter(model, scale=0.05)
    return model.train()


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def in_a_process(out: Path) -> None:
    """What each of the two processes does; the first one writes its losses."""
    import deepspeed

    # Collectives in shared memory are a C++ extension, which takes minutes to compile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank, said = distributed.get_rank(), {}
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    for method in METHODS:
        model = build(method)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        losses = []
        for seed in range(STEPS):
            ids = token_ids(4, 12, seed=seed)[2 * rank : 2 * rank + 2]
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            total = loss.detach().clone()
            distributed.all_reduce(total)
            losses.append(total.item() / 2)
        said[method] = losses
        model.save_pretrained(out / method)
        try:
            model.merge()
        except ValueError as error:
            said[f"merge {method}"] = str(error)
    if rank == 0:
        torch.save(said, out / "said.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: see CONTRIBUTING.md")
def test_two_processes_are_as_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    said = torch.load(tmp_path / "said.pt", weights_only=True)
    for method in METHODS:
        one, losses = build(method), []
        optimizer = optimizer_of(one)
        for seed in range(STEPS):
            ids = token_ids(4, 12, seed=seed)
            loss = one(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        torch.testing.assert_close(losses, said[method], rtol=0, atol=1e-5)
        saved, parameters = load_file(tmp_path / method / "adapter_model.safetensors"), one.adapter_parameters()
        assert saved.keys() == parameters.keys()
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, parameters[name].detach(), rtol=0, atol=1e-5)
        loaded = CAUSAL_LM[method].from_pretrained(tmp_path / method, base_model=tiny_base())
        assert all(torch.equal(loaded.adapter_parameters()[name], tensor) for name, tensor in saved.items())
        torch.testing.assert_close(logits(loaded), logits(one.eval()), rtol=0, atol=1e-4)
    assert "split over processes" in said["merge dora"]


if __name__ == "__main__":
    in_a_process(Path(sys.argv[1]))
