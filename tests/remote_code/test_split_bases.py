"""Adapters under FSDP2 learn and are saved as in one process, whether they or the split came first.

Bases that are split otherwise are refused by name.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import CAUSAL_LM, fill_adapter, logits, tiny_config, token_ids
from tiny_architectures import tiny_architecture
from torch import distributed
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from minilora_hub import DoraConfig, MixLoraPeftConfig
from minilora_hub.remote_code.modeling_minilora import adapted_class

PAGE = Path(__file__).parents[2] / "docs" / "train.md"
KINDS = [("llama", "dora"), ("llama", "mixlora"), ("mixtral", "dora"), ("gpt_oss", "dora")]
LABELS = torch.tensor([0, 1, 1, 0])


def config_of(method: str):
    # The balance loss is not the mean of its values on two halves of a batch.
    return tiny_config(method, **({"router_aux_loss_coef": 0.0} if method == "mixlora" else {}))


def build(family: str, method: str):
    model = CAUSAL_LM[method].from_base(tiny_architecture(family), config_of(method))
    fill_adapter(model, scale=0.05)
    return model.train()


def classifier():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(tiny_architecture("llama").config)


def with_head(base):
    """Adapt a classifier, whose head is trained and saved whole with the adapter."""
    return adapted_class("Dora", "AutoModelForSequenceClassification").from_base(base, DoraConfig(r=4)).train()


def curve(model, rank: int | None, labels: torch.Tensor | None = None) -> list[float]:
    """Train on four batches, on the rank's half of each under FSDP2; the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for seed in range(4):
        ids = token_ids(4, 12, seed=seed)
        given = ids if labels is None else labels
        ids, given = (each if rank is None else each[2 * rank : 2 * rank + 2] for each in (ids, given))
        loss = model(input_ids=ids, labels=given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if rank is not None:
            distributed.all_reduce(total)
            total /= 2
        losses.append(total.item())
    return losses


def snippets() -> list[str]:
    """The code of docs/train.md that splits an adapted model, and that adapts a split base."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in blocks if "fully_shard(" in block]


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

    def base_of(family, dtype=torch.float32):
        base = tiny_architecture(family).to(dtype)
        return split(base, base.model.layers)

    for family, method in KINDS:
        model = build(family, method)
        split(model, model.base.model.layers)
        said["adapter first", family, method] = curve(model, rank)
        model.save_pretrained(out / f"adapter first-{family}-{method}")
        if (family, method) == KINDS[0]:
            refusal("merge", model.merge)
        fresh = CAUSAL_LM[method].from_base(base_of(family), config_of(method))
        trained = {id(parameter) for parameter in fresh.parameters() if parameter.requires_grad}
        assert trained == set(map(id, fresh.adapter_parameters().values()))
        fresh.save_pretrained(out / f"fresh-{family}-{method}")
        model = CAUSAL_LM[method].from_pretrained(out / f"filled-{family}-{method}", base_model=base_of(family))
        said["generated", family, method] = model.generate(token_ids(1, 5), max_new_tokens=4, do_sample=False)
        said["split first", family, method] = curve(model.train(), rank)
        model.save_pretrained(out / f"split first-{family}-{method}")
    said["unloaded"] = torch.equal(*(logits(each) for each in (model.unload(), tiny_architecture(family))))
    half = CAUSAL_LM["dora"].from_base(base_of("llama", torch.bfloat16), config_of("dora"))
    said["half"] = curve(half.train(), rank)
    said["half's adapter"] = {str(parameter.dtype) for parameter in half.adapter_parameters().values()}
    bases = [classifier(), classifier()]
    bases = [split(base, base.model.layers) for base in bases]
    model = with_head(bases[0])
    said["head"] = curve(model, rank, LABELS)
    model.save_pretrained(out / "head")
    distributed.barrier()  # the first process has written it
    again = type(model).from_pretrained(out / "head", base_model=bases[1])
    said["head again"] = torch.equal(*(logits(each.eval()) for each in (model, again)))
    for code, name in zip(snippets(), ("page 1", "page 2"), strict=True):
        exec(code.replace("org/base", str(out / "base")).replace('"adapter"', repr(str(out / name))), {})

    base = tiny_architecture("llama")
    split(base, [base.model.layers[1].mlp.up_proj, *base.model.layers])
    refusal("linear", lambda: CAUSAL_LM["dora"].from_base(base, tiny_config("dora")))
    base = tiny_architecture("llama")
    fully_shard(base, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts")))
    refusal("two dimensions", lambda: CAUSAL_LM["dora"].from_base(base, tiny_config("dora")))
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[3] *= 2
    split(base, base.model.layers)
    refusal("other weights", lambda: CAUSAL_LM["dora"].from_base(base, tiny_config("dora")))
    refusal("peft", lambda: get_peft_model(base_of("llama"), MixLoraPeftConfig(r=4, num_experts=4)))
    plan = {"tp_plan": "auto"}
    refusal("tp_plan", lambda: CAUSAL_LM["dora"].from_base(str(out / "base"), tiny_config("dora"), **plan))
    if rank == 0:
        torch.save(said, out / "said.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    tiny_architecture("llama").save_pretrained(tmp_path / "base")
    for family, method in KINDS:
        build(family, method).save_pretrained(tmp_path / f"filled-{family}-{method}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:4000]
    said = torch.load(tmp_path / "said.pt", weights_only=True)
    for family, method in KINDS:
        fresh = CAUSAL_LM[method].from_base(tiny_architecture(family), config_of(method)).adapter_parameters()
        for name, tensor in load_file(tmp_path / f"fresh-{family}-{method}" / "adapter_model.safetensors").items():
            assert torch.equal(tensor, fresh[name].detach())
        one = build(family, method)
        generated = one.eval().generate(token_ids(1, 5), max_new_tokens=4, do_sample=False)
        assert torch.equal(generated, said["generated", family, method])
        losses, parameters = curve(one.train(), None), one.adapter_parameters()
        for order in ("adapter first", "split first"):
            torch.testing.assert_close(losses, said[order, family, method], rtol=0, atol=1e-5)
            folder = tmp_path / f"{order}-{family}-{method}"
            saved = load_file(folder / "adapter_model.safetensors")
            assert saved.keys() == parameters.keys()
            for name, tensor in saved.items():
                torch.testing.assert_close(tensor, parameters[name].detach(), rtol=0, atol=1e-5)
            loaded = CAUSAL_LM[method].from_pretrained(folder, base_model=tiny_architecture(family))
            assert all(torch.equal(loaded.adapter_parameters()[name], tensor) for name, tensor in saved.items())
            torch.testing.assert_close(logits(loaded), logits(one.eval()), rtol=0, atol=1e-4)
    assert said["unloaded"]
    one = CAUSAL_LM["dora"].from_base(tiny_architecture("llama").to(torch.bfloat16), config_of("dora"))
    torch.testing.assert_close(curve(one.train(), None), said["half"], rtol=0, atol=2e-3)  # products in bfloat16
    assert said["half's adapter"] == {"torch.float32"}
    torch.testing.assert_close(curve(with_head(classifier()), None, LABELS), said["head"], rtol=0, atol=1e-5)
    for page in ("page 1", "page 2"):
        assert (tmp_path / page / "adapter_model.safetensors").is_file()
    assert said["head again"]
    assert "split over processes" in said["merge"]
    assert "FSDP2 has split model.layers.1.mlp.up_proj as a group of its own" in said["linear"]
    assert (
        "has other weights than its files (model.layers.1.mlp.up_proj.weight has other values)" in said["other weights"]
    )
    assert "model.embed_tokens.weight is split over processes: call get_peft_model on a whole base" in said["peft"]
    for name in ("two dimensions", "tp_plan"):
        assert "is split over processes, but not by FSDP2 over a mesh of one dimension" in said[name]


def test_a_base_in_zero_3_is_refused_by_name():
    base = tiny_architecture("llama")
    base.model.layers[0].mlp.up_proj.weight.ds_id = 7  # as DeepSpeed marks what it has split
    for method in ("dora", "mixlora"):
        with pytest.raises(ValueError, match=r"up_proj\.weight is split over processes.*the adapter on a whole base"):
            CAUSAL_LM[method].from_base(base, tiny_config(method))


if __name__ == "__main__":
    in_a_process(Path(sys.argv[1]))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="accelerate splits models on accelerators")
def test_whole_copies_under_accelerates_fsdp_are_told(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.warns(UserWarning, match=r"accelerate's FSDP splits nothing on CPUs: .* call fully_shard\(model\)"):
        build("llama", "dora")
