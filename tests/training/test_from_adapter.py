"""Training that continues from an adapter: what is inherited, what learns, what is refused, what the card says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import SHORT, losses, train_until, write_base

from minilora_hub.adapter_folder.results import Results
from minilora_hub.errors import TrainingError
from minilora_hub.formats.importing import import_adapter, import_as_experts
from minilora_hub.training.run import train

WEIGHTS = "adapter_model.safetensors"
RUN = {name: value for name, value in SHORT.items() if name != "r"} | {"record": False}


@pytest.fixture(scope="module")
def parents(base, data, tmp_path_factory):
    """A function that returns the folder of a trained adapter of a method, trained once."""
    folder, made = tmp_path_factory.mktemp("parents"), {}

    def parent(method: str) -> str:
        if method not in made:
            experts = {"num_experts": 3, "expert_r": 2} if "mix" in method else {}
            train(folder / method, method=method, base=base, data=data, r=4, lora_alpha=6, **RUN, **experts)
            made[method] = str(folder / method)
        return made[method]

    return parent


def changed(before, after) -> set[str]:
    """The names of tensors that differ."""
    old, new = load_file(f"{before}/{WEIGHTS}"), load_file(after / WEIGHTS)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize(
    "method",
    ["lora", pytest.param("dora", marks=pytest.mark.slow), pytest.param("mixlora", marks=pytest.mark.slow), "mixdora"],
)
def test_it_starts_at_the_parents_weights_and_settings(method, parents, data, tmp_path):
    """With a learning rate that changes nothing the tensors are the parent's, byte for byte; then they learn."""
    parent = parents(method)
    train(tmp_path / "same", from_adapter=parent, data=data, **RUN | {"learning_rate": 1e-30})
    assert changed(parent, tmp_path / "same") == set()
    name = "adapter_config.json" if method == "lora" else "config.json"
    before, after = (json.loads(Path(folder, name).read_text()) for folder in (parent, tmp_path / "same"))
    assert (after["r"], after["lora_alpha"]) == (4, 6)
    differing = {field for field in before if before[field] != after[field]}
    assert differing <= {"target_modules"}
    train(tmp_path / "on", from_adapter=parent, data=data, **RUN)
    assert len(changed(parent, tmp_path / "on")) > 20
    results = Results.load(tmp_path / "on")
    assert results.training.parent.adapter == method
    assert results.training.parent.weights_sha256 == hashlib.sha256(Path(parent, WEIGHTS).read_bytes()).hexdigest()


def test_the_first_loss_is_the_parents(parents, data, tmp_path):
    """The first logged loss of a continued run is that of a frozen one, elementwise over its steps."""
    parent = parents("mixlora")
    train(tmp_path / "frozen", from_adapter=parent, data=data, **RUN | {"learning_rate": 1e-30})
    train(tmp_path / "on", from_adapter=parent, data=data, **RUN)
    train(tmp_path / "fresh", method="mixlora", base=json_base(parent), data=data, num_experts=3, r=4, **RUN)
    frozen, on, fresh = (losses(tmp_path / name) for name in ("frozen", "on", "fresh"))
    assert on[0] == pytest.approx(frozen[0], abs=1e-6)
    assert on[0] < fresh[0] - 0.1


def json_base(folder: str) -> str:
    return json.loads(Path(folder, "config.json").read_text())["base_model_name_or_path"]


@pytest.mark.parametrize(
    ("learn", "part"), [("router", ".router"), ("experts", ".experts."), ("attention", ".self_attn.")]
)
def test_only_the_chosen_part_learns(learn, part, parents, data, tmp_path):
    parent = parents("mixlora")
    result = train(tmp_path / "out", from_adapter=parent, learn=learn, data=data, **RUN)
    different = changed(parent, tmp_path / "out")
    assert different
    assert all(part in name for name in different)
    tensors = load_file(f"{parent}/{WEIGHTS}")
    assert result.plan.trainable == sum(value.numel() for name, value in tensors.items() if part in name)
    results = Results.load(tmp_path / "out")
    assert results.parameters == sum(value.numel() for value in tensors.values())
    assert results.base.parameters == Results.load(parent).base.parameters
    assert results.training.parent.learned == learn


def test_attention_of_a_lora(parents, data, tmp_path):
    parent = parents("lora")
    train(tmp_path / "out", from_adapter=parent, learn="attention", data=data, **RUN)
    different = changed(parent, tmp_path / "out")
    assert {".self_attn." in name for name in different} == {True}


def test_a_router_can_be_used_in_another_way(parents, data, tmp_path):
    said = {"routing_strategy": "switch", "expert_capacity": 1000, "learn": "router"}
    train(tmp_path / "out", from_adapter=parents("mixlora"), data=data, **RUN, **said)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["routing_strategy"], config["expert_capacity"], config["num_experts"]) == ("switch", 1000, 3)


@pytest.mark.parametrize(
    ("method", "said", "message"),
    [
        ("lora", {"r": 8}, "r=8: the adapter '.*' fixes it to 4"),
        ("lora", {"method": "dora"}, "method='dora': '.*' is a lora: leave it out"),
        ("lora", {"learn": "router"}, "learn='router': needs a mixture"),
        ("mixlora", {"learn": "experts", "router_lr_ratio": 2}, "router_lr_ratio=2.0: needs a mixture whose routers"),
        ("mixlora", {"learn": "router", "loraplus_ratio": 2}, "loraplus_ratio=2.0: routers have no A and B"),
        ("mixlora", {"learn": "half"}, "learn='half': must be one of all, router, experts, attention"),
        (
            "mixlora",
            {"learn": "router", "num_experts_per_tok": 1},
            "num_experts_per_tok=1: with top_k routing the weight of the one expert is always 1",
        ),
        ("mixlora", {"from_revision": "main"}, "from_revision='main': '.*' is a folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(method, said, message, parents, data, tmp_path):
    with pytest.raises(TrainingError, match=message):
        train(tmp_path / "out", from_adapter=parents(method), data=data, **RUN, **said)
    assert not (tmp_path / "out").exists()


def test_an_import_for_another_base_says_so(parents, tmp_path):
    parent, other = parents("lora"), write_base(tmp_path / "other", seed=1)
    one = import_adapter(parent, tmp_path / "one", base=str(other))
    several = import_as_experts([parent, parent], tmp_path / "several", base=str(other))
    for note in (one.notes[-1], several.notes[-1]):
        assert note.startswith("lora was trained on a base with fingerprint sha256:")
    assert not import_adapter(parent, tmp_path / "same").notes


def test_a_fresh_adapter_learns_as_a_whole(base, data, tmp_path):
    with pytest.raises(TrainingError, match="learn='router': needs --from ADAPTER"):
        train(tmp_path / "out", method="mixlora", base=base, data=data, learn="router", **RUN)


def test_another_base_is_refused_by_its_fingerprint(parents, data, tmp_path):
    other = str(write_base(tmp_path / "other", seed=1))
    with pytest.raises(TrainingError, match=r"it was trained on a base with fingerprint sha256:.* pass --base"):
        train(tmp_path / "out", from_adapter=parents("dora"), base=other, data=data, **RUN)


def test_a_copy_of_the_base_is_taken(base, parents, data, tmp_path):
    copy = str(write_base(tmp_path / "copy"))
    result = train(tmp_path / "out", from_adapter=parents("dora"), base=copy, data=data, **RUN)
    assert result.notes == ()


def test_it_resumes_to_the_same_bytes_from_the_same_parent_only(parents, data, tmp_path, monkeypatch):
    import shutil

    parent = shutil.copytree(parents("mixlora"), tmp_path / "parent")
    said = RUN | {"from_adapter": str(parent), "learn": "router", "data": data, "max_steps": 5}
    train(tmp_path / "whole", **said)
    train_until(3, monkeypatch, tmp_path / "cut", **said)
    weights = (parent / WEIGHTS).read_bytes()
    (parent / WEIGHTS).write_bytes(((tmp_path / "whole") / WEIGHTS).read_bytes())
    with pytest.raises(TrainingError, match="parent' has changed since the run began"):
        train(tmp_path / "cut", resume=True, record=False)
    (parent / WEIGHTS).write_bytes(weights)
    train(tmp_path / "cut", resume=True, record=False)
    digests = {hashlib.sha256((tmp_path / name / WEIGHTS).read_bytes()).hexdigest() for name in ("whole", "cut")}
    assert len(digests) == 1


@pytest.mark.parametrize("method", ["dora", "mixlora"])
def test_a_quantised_base(method, parents, data, tmp_path):
    train(tmp_path / "out", from_adapter=parents(method), data=data, quantize="nf4", **RUN)
    assert "NF4" in Results.load(tmp_path / "out").base.note
    assert changed(parents(method), tmp_path / "out")


def test_a_plan_writes_nothing(parents, data, tmp_path):
    plan = train(tmp_path / "out", from_adapter=parents("mixlora"), learn="router", data=data, dry_run=True, **RUN).plan
    assert dict(plan.lines())["from"] == f"{parents('mixlora')}; its router is trained"
    assert not (tmp_path / "out").exists()
