"""Adapters under FSDP2 learn and are saved as in one process; bases that are split otherwise are refused by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import CAUSAL_LM, fill_adapter, logits, tiny_config, tiny_model, token_ids
from tiny_architectures import tiny_architecture
from torch import distributed

PAGE = Path(__file__).parents[2] / "docs" / "train.md"
KINDS = [("llama", "dora"), ("llama", "mixlora"), ("mixtral", "dora"), ("gpt_oss", "dora")]


def build(family: str, method: str):
    # The balance loss is not the mean of its values on two halves of a batch.
    changes = {"router_aux_loss_coef": 0.0} if method == "mixlora" else {}
    model = CAUSAL_LM[method].from_base(tiny_architecture(family), tiny_config(method, **changes))
    fill_adapter(model, scale=0.05)
    return model.train()


def curve(model, rank: int | None) -> list[float]:
    """Train on four batches, on the rank's half of each under FSDP2; the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for seed in range(4):
        ids = token_ids(4, 12, seed=seed)
        ids = ids if rank is None else ids[2 * rank : 2 * rank + 2]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if rank is not None:
            distributed.all_reduce(total)
            total /= 2
        losses.append(total.item())
    return losses


def snippet() -> str:
    """The code of docs/train.md that splits an adapted model."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "fully_shard" in block)


def in_a_process(out: Path) -> None:
    """What each of the two processes does; the first one writes what it found."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def split(model, layers):
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    distributed.init_process_group("gloo")
    rank, mesh = distributed.get_rank(), init_device_mesh("cpu", (2,))
    said = {}

    def refusal(name, call):
        try:
            call()
        except ValueError as error:
            said[name] = str(error)

    for family, method in KINDS:
        model = build(family, method)
        split(model, model.base.model.layers)
        said[family, method] = curve(model, rank)
        model.save_pretrained(out / f"{family}-{method}")
        if (family, method) == KINDS[0]:
            refusal("merge", model.merge)
    exec(snippet().replace("org/base", str(out / "base")).replace('"adapter"', repr(str(out / "by the page"))), {})
    base = tiny_architecture("llama")
    split(base, base.model.layers)
    refusal("split base", lambda: CAUSAL_LM["dora"].from_base(base, tiny_config("dora")))
    plan = {"tp_plan": "auto"}
    refusal("tp_plan", lambda: CAUSAL_LM["dora"].from_base(str(out / "base"), tiny_config("dora"), **plan))
    if rank == 0:
        torch.save(said, out / "said.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    tiny_architecture("llama").save_pretrained(tmp_path / "base")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = torch.load(tmp_path / "said.pt", weights_only=True)
    for family, method in KINDS:
        one = build(family, method)
        torch.testing.assert_close(curve(one, None), said[family, method], rtol=0, atol=1e-5)
        folder = tmp_path / f"{family}-{method}"
        saved, parameters = load_file(folder / "adapter_model.safetensors"), one.adapter_parameters()
        assert saved.keys() == parameters.keys()
        for name, tensor in saved.items():
            torch.testing.assert_close(tensor, parameters[name].detach(), rtol=0, atol=1e-5)
        loaded = CAUSAL_LM[method].from_pretrained(folder, base_model=tiny_architecture(family))
        torch.testing.assert_close(logits(loaded), logits(one.eval()), rtol=0, atol=1e-4)
    assert (tmp_path / "by the page" / "adapter_model.safetensors").is_file()
    assert "split over processes" in said["merge"]
    for name in ("split base", "tp_plan"):
        assert "is split over processes: put the adapter on a whole base" in said[name]


def test_zero_3_is_refused_by_name(tmp_path):
    base = tiny_architecture("llama")
    base.model.layers[0].mlp.up_proj.weight.ds_id = 7  # as DeepSpeed marks what it has split
    for method in ("dora", "mixlora"):
        with pytest.raises(ValueError, match=r"up_proj\.weight is split over processes.*ZeRO-3"):
            CAUSAL_LM[method].from_base(base, tiny_config(method))
    model = tiny_model()
    next(iter(model.adapter_parameters().values())).ds_id = 7
    with pytest.raises(ValueError, match="split by DeepSpeed's ZeRO-3: pass state_dict="):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


if __name__ == "__main__":
    in_a_process(Path(sys.argv[1]))
