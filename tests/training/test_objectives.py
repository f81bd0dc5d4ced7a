"""The terms added to the loss, each against an independent computation, and what they do to a trained adapter."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import SHORT, randomized, train_until
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
from minilora_hub.adapter_folder.results import Results
from minilora_hub.bases.skeleton import find_base
from minilora_hub.errors import TrainingError
from minilora_hub.training.kept_adapters import KeptAdapters
from minilora_hub.training.lora_model import LoraConfig, LoraForCausalLM
from minilora_hub.training.objective_specs import parse_objectives
from minilora_hub.training.objectives import Step, build_objectives
from minilora_hub.training.objectives import divergence as kl_divergence
from minilora_hub.training.parent_adapter import find_adapter
from minilora_hub.training.run import train

WEIGHTS = "adapter_model.safetensors"
RUN = {name: value for name, value in SHORT.items() if name != "r"} | {"record": False}
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[257, 40, 83, 68, 76, 256, 258, 81], [257, 41, 84, 69, 77, 256, 258, 82]])
LABELS = torch.where(torch.arange(8) < 5, -100, IDS)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "general.txt"
    file.write_text("The sky is blue and the grass is green. " * 20, encoding="utf-8")
    return str(file)


def saved(model, folder) -> str:
    model.save_pretrained(folder)
    return str(folder)


def one_objective(text: str, model, base: str, kept=()):
    (objective,) = build_objectives(parse_objectives([text]), model, find_base(base), tokenizer_of(base), 0, kept)
    return objective


def tokenizer_of(base: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def step_of(model) -> Step:
    hidden = model.base.base_model(IDS, use_cache=False).last_hidden_state
    return Step(model, {"input_ids": IDS, "labels": LABELS}, hidden, (0, 0))


def divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """T^2 sum_v p log(p / q) by its definition, in float64: (tokens)."""
    p, q = (F.softmax(logits.double() / temperature, dim=-1) for logits in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum(-1)


def logits_of(model) -> torch.Tensor:
    return model(IDS, use_cache=False).logits[:, :-1][LABELS[:, 1:] != -100]


def test_the_divergence_of_nearly_equal_distributions_is_not_negative():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    near = (logits + 1e-7 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(1))).log_softmax(-1)
    assert F.kl_div(near, logits.log_softmax(-1), log_target=True, reduction="none").sum(-1).min() < 0
    assert 0 <= kl_divergence(near, logits.log_softmax(-1)) < 1e-4


@pytest.mark.parametrize("student", ["lora", "dora", "mixlora"])
@pytest.mark.parametrize("teacher", ["lora", "dora", "mixlora"])
def test_distillation_is_the_divergence_from_the_teacher_loaded_apart(student, teacher, base, tmp_path):
    """Against a second, complete model of the teacher; and the student is afterwards what it was."""
    kinds = {
        "lora": (LoraForCausalLM, LoraConfig(r=2)),
        "dora": (DoraForCausalLM, DoraConfig(r=2)),
        "mixlora": (MixLoraForCausalLM, MixLoraConfig(r=2, num_experts=3)),
    }
    other = randomized(kinds[teacher][0].from_base(base, kinds[teacher][1]), 1).eval()
    model = randomized(kinds[student][0].from_base(base, kinds[student][1]), 2)
    before = logits_of(model).detach()
    objective = one_objective(f"distill:teacher={saved(other, tmp_path / 'teacher')},temperature=2", model, base)
    term = objective(step_of(model))
    with torch.no_grad():
        expected = divergence(logits_of(other), before, 2.0).mean()
    torch.testing.assert_close(term.value.double(), expected, rtol=1e-4, atol=1e-7)
    assert term.labels == 6
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=0)
    term.value.backward()
    assert all(parameter.grad is not None for parameter in model.adapter_parameters().values())
    own = {id(parameter) for parameter in model.parameters()}  # a teacher's block holds the student's linears
    frozen = [p for module in objective.modules.values() for p in module.parameters() if id(p) not in own]
    assert frozen
    assert not any(parameter.requires_grad for parameter in frozen)


def test_a_mixture_of_equal_experts_is_one_lora(base, tmp_path):
    """The LoRA that every expert equals is at divergence zero from the mixture, without a gradient."""
    lora = randomized(LoraForCausalLM.from_base(base, LoraConfig(r=2, lora_alpha=4)), 3)
    mixture = MixLoraForCausalLM.from_base(base, MixLoraConfig(r=2, lora_alpha=4, num_experts=3))
    tensors = lora.adapter_parameters()
    with torch.no_grad():
        for name, parameter in mixture.adapter_parameters().items():
            if ".experts." in name:
                parameter.copy_(tensors[name.replace(".experts.", ".")].expand_as(parameter))
            elif not name.endswith(".router"):
                parameter.copy_(tensors[name])
    objective = one_objective(f"distill:teacher={saved(mixture, tmp_path / 'mixture')}", lora, base)
    term = objective(step_of(lora))
    term.value.backward()
    # The objective's float32 sum keeps rounding errors of first order, so its bound is one float32 epsilon.
    assert term.value.abs() < torch.finfo(torch.float32).eps
    with torch.no_grad():
        assert divergence(logits_of(mixture.eval()), logits_of(lora), 1.0).abs().max() < 1e-9
    assert max(parameter.grad.abs().max() for parameter in tensors.values()) < 1e-6


@pytest.mark.slow
def test_a_mixture_of_equal_experts_is_learned_from_nothing(base, data, tmp_path):
    """A fresh LoRA of the expert's rank, trained on the divergence alone, reaches the mixture's distribution."""
    mixture = MixLoraForCausalLM.from_base(base, MixLoraConfig(r=2, num_experts=3, target_modules=FEED_FORWARD))
    randomized(mixture, 4)
    with torch.no_grad():
        for name, parameter in mixture.adapter_parameters().items():
            if ".experts." in name:
                parameter.copy_(parameter[:1].expand_as(parameter).clone())
    teacher = saved(mixture, tmp_path / "mixture")
    said = {"method": "lora", "r": 2, "target_modules": FEED_FORWARD, "max_steps": 400, "save_every": 400}
    said |= {"objective": [f"distill:teacher={teacher},labels=0"], "learning_rate": 4e-2}
    train(tmp_path / "out", base=base, data=data, **RUN | said)
    column = logged(tmp_path / "out", "distill")
    assert column[-1] < 0.01 * column[0]


def logged(out, name: str) -> list[float]:
    header, *lines = (out / "loss.csv").read_text().splitlines()
    return [float(line.split(",")[header.split(",").index(name)]) for line in lines]


def test_overlap_is_the_sum_of_inner_products_of_rows(base, tmp_path):
    kept = randomized(LoraForCausalLM.from_base(base, LoraConfig(r=3), seed=1), 5)
    model = randomized(LoraForCausalLM.from_base(base, LoraConfig(r=2), seed=2), 6)
    earlier, own = kept.adapter_parameters(), model.adapter_parameters()
    expected = sum(
        abs(float(row @ other))
        for name in own
        if name.endswith("lora_A")
        for row in own[name].detach()
        for other in earlier[name].detach()
    )
    adapters = [find_adapter(saved(kept, tmp_path / "kept"))]
    under = KeptAdapters(model, adapters, find_base(base))
    term = one_objective("orthogonal", model, base, under.factors)(step_of(model))
    assert term.labels is None
    assert float(term.value.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_kept_adapters_are_active_and_can_be_removed(targets, base, tmp_path):
    """W + kept + new, on linears that both have, or the kept one alone; against the sum of dense weights."""
    kept = randomized(LoraForCausalLM.from_base(base, LoraConfig(r=3)), 7)
    model = randomized(LoraForCausalLM.from_base(base, LoraConfig(r=2, target_modules=targets)), 8)
    alone = logits_of(model).detach()
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapted in (kept, model):
        for site in adapted.sites:
            update = adapted.base.get_submodule(site.path).update
            dense.get_submodule(site.path).weight.data += update.scaling * update.lora_B.data @ update.lora_A.data
    under = KeptAdapters(model, [find_adapter(saved(kept, tmp_path / "kept"))], find_base(base))
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-4, atol=1e-4)
    assert {name for name, p in model.named_parameters() if p.requires_grad and ".base_layer." in name} == set()
    under.remove()
    torch.testing.assert_close(logits_of(model), alone, rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_with_kept_adapters_saves_their_sum(base, data, tmp_path):
    """O-LoRA's next task: less overlap than without the term, and a LoRA that holds both tasks."""
    first = tmp_path / "first"
    train(first, method="lora", base=base, data=data, r=4, **RUN)
    long = RUN | {"max_steps": 20, "save_every": 20, "method": "lora", "r": 2, "base": base, "data": data}
    train(tmp_path / "with", keep=[str(first)], objective=["orthogonal:weight=0.5"], **long)
    train(tmp_path / "tiny", keep=[str(first)], objective=["orthogonal:weight=1e-9"], **long)
    assert logged(tmp_path / "with", "orthogonal")[-1] < 0.5 * logged(tmp_path / "tiny", "orthogonal")[-1]
    config = json.loads((tmp_path / "with" / "adapter_config.json").read_text())
    assert config["r"] == 6
    old, new = load_file(first / WEIGHTS), load_file(tmp_path / "with" / WEIGHTS)
    for name, tensor in old.items():  # the first task is in it: A scaled by alpha / r = 2, B as it was
        part = new[name][:4] / 2 if "lora_A" in name else new[name][:, :4]
        torch.testing.assert_close(part, tensor, rtol=1e-6, atol=1e-7)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    assert torch.isfinite(logits_of(loaded)).all()
    results = Results.load(tmp_path / "with")
    assert results.parameters == sum(tensor.numel() for tensor in new.values())
    assert results.training.hyperparameters["kept adapters"] == "first"


@pytest.mark.parametrize("kind", ["dora", "mixlora", "switch"])
def test_the_anchor_is_the_divergence_from_the_bare_base(kind, base, text):
    routing = {"routing_strategy": "switch", "num_experts_per_tok": 1} if kind == "switch" else {}
    model = (
        DoraForCausalLM.from_base(base, DoraConfig(r=2))
        if kind == "dora"
        else MixLoraForCausalLM.from_base(base, MixLoraConfig(r=2, num_experts=3, router_jitter_noise=0.0, **routing))
    )
    randomized(model, 9).train()
    objective = one_objective(f"anchor:data={text},rows=2,length=12", model, base)
    seen = []
    handle = model.base.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args[0], output.logits)), with_kwargs=True
    )
    place = SimpleNamespace(model=model, place=(3, 1))
    term = objective(place)
    handle.remove()
    (ids, _), (_, student) = seen
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = divergence(bare(ids).logits, student).mean()
    assert ids.shape == (2, 12)
    torch.testing.assert_close(term.value.double(), expected, rtol=1e-4, atol=1e-7)
    assert objective(place).value.item() == term.value.item()
    assert objective(SimpleNamespace(model=model, place=(4, 1))).value.item() != term.value.item()


@pytest.mark.slow
def test_an_anchored_run_stays_nearer_to_the_base(base, data, text, tmp_path):
    said = RUN | {"method": "dora", "r": 4, "base": base, "data": data, "max_steps": 12, "save_every": 12}
    for name, weight in (("free", 1e-9), ("held", 5.0)):
        train(tmp_path / name, objective=[f"anchor:data={text},weight={weight},length=32"], **said)
    assert logged(tmp_path / "held", "anchor")[-1] < 0.5 * logged(tmp_path / "free", "anchor")[-1]
    (row,) = [Results.load(tmp_path / "held").training.hyperparameters["objectives"]]
    assert row == "anchor: data=general.txt, weight=5, length=32"


@pytest.mark.parametrize("micro", [4, 2])
def test_the_logged_loss_is_the_labels_plus_the_weighted_terms(micro, base, data, text, tmp_path):
    """With and without accumulation: the loss without objectives, and each term as it is logged."""
    teacher = saved(randomized(DoraForCausalLM.from_base(base, DoraConfig(r=2)), 10), tmp_path / "teacher")
    said = RUN | {"method": "mixlora", "num_experts": 3, "r": 2, "base": base, "data": data, "max_steps": 1}
    said |= {"save_every": 1}
    train(tmp_path / "plain", micro_batch_size=micro, **said)
    objectives = [f"distill:teacher={teacher},weight=0.5,labels=0.25", f"anchor:data={text},weight=2,length=16"]
    train(tmp_path / "out", micro_batch_size=micro, objective=objectives, **said)
    (plain,), (loss,) = logged(tmp_path / "plain", "loss"), logged(tmp_path / "out", "loss")
    (distill,), (anchor,) = logged(tmp_path / "out", "distill"), logged(tmp_path / "out", "anchor")
    # The log's mean over micro-batches is that over labels only where they have equally many.
    bound = 1e-4 if micro == 4 else 0.02
    assert loss == pytest.approx(0.25 * plain + 0.5 * distill + 2 * anchor, abs=bound)


@pytest.mark.slow
def test_runs_with_objectives_resume_to_the_same_bytes(base, data, text, tmp_path, monkeypatch):
    teacher = saved(randomized(DoraForCausalLM.from_base(base, DoraConfig(r=2)), 11), tmp_path / "teacher")
    said = RUN | {"method": "lora", "r": 2, "base": base, "data": data, "max_steps": 5, "lora_dropout": 0.1}
    said |= {"objective": [f"distill:teacher={teacher}", f"anchor:data={text},length=16"], "micro_batch_size": 2}
    train(tmp_path / "whole", **said)
    train_until(3, monkeypatch, tmp_path / "cut", **said)
    train(tmp_path / "cut", resume=True, record=False)
    digests = {hashlib.sha256((tmp_path / name / WEIGHTS).read_bytes()).hexdigest() for name in ("whole", "cut")}
    assert len(digests) == 1


def test_a_term_that_is_not_finite_stops_the_run(base, data, text, tmp_path, monkeypatch):
    from minilora_hub.training.objectives import Anchor, Term

    monkeypatch.setattr(Anchor, "__call__", lambda self, step: Term(torch.tensor(math.nan)))
    said = RUN | {"method": "lora", "r": 2, "base": base, "data": data}
    # The plan measures a step, too: without one, it is the run that stops.
    unmeasured = make_dataclass("Unmeasured", ["ranks", "init"])(None, None)
    monkeypatch.setattr("minilora_hub.training.run.make_plan", lambda *args: unmeasured)
    with pytest.raises(TrainingError, match=r"the loss became nan in step 1 on rows\.jsonl"):
        train(tmp_path / "out", objective=[f"anchor:data={text},length=16"], **said)


@pytest.mark.slow
def test_a_quantised_base_with_every_objective(base, data, text, tmp_path):
    first = tmp_path / "first"
    train(first, method="lora", base=base, data=data, r=2, **RUN)
    said = RUN | {"method": "lora", "r": 2, "base": base, "data": data, "quantize": "nf4", "max_steps": 2}
    train(tmp_path / "held", objective=[f"distill:teacher={first}", f"anchor:data={text},length=16"], **said)
    train(tmp_path / "next", objective=["orthogonal"], keep=[str(first)], **said)
    assert json.loads((tmp_path / "next" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distil:teacher=x", "objective='distil:teacher=x': must be one of distill, orthogonal, anchor"),
        ("distill", "teacher is missing: distill:teacher=…"),
        ("distill:teacher=x,temprature=2", "no key 'temprature'; did you mean 'temperature'"),
        ("distill:teacher=x,temperature=0", "temperature='0' must be a number above 0"),
        ("distill:teacher=x,labels=-1", "labels='-1' must be a number at least 0"),
        ("anchor:data=x,rows=1.5", "rows='1.5' must be a whole number above 0"),
        ("anchor:x", "'x' must be key=value"),
        ("anchor:data=x,rows=1,rows=2", "rows is given twice"),
        ("anchor:data=~/none/x.txt", "data='~/none/x.txt' cannot be read: No such file or directory"),
        ("orthogonal", "orthogonal needs --keep"),
    ],
)
def test_wrong_objectives_are_one_sentence(text, message, base, data, tmp_path):
    with pytest.raises(TrainingError, match=message.replace("'", "['\"]")):
        train(tmp_path / "out", method="lora", base=base, data=data, objective=[text], **RUN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"method": "dora", "keep": ["x"]}, "needs --method lora"),
        (
            {"method": "lora", "keep": ["x"], "objective": ["distill:teacher=x"]},
            "goes with no objective but orthogonal",
        ),
        ({"method": "rslora", "objective": ["distill:teacher=x"]}, "needs one of the methods lora, dora"),
        ({"method": "lora", "objective": ["orthogonal", "orthogonal"], "keep": ["x"]}, "'orthogonal' is given twice"),
        ({"method": "lora", "objective": ["distill:teacher=./none"]}, "no such folder"),
    ],
)
def test_combinations_that_cannot_be(said, message, base, data, tmp_path):
    from minilora_hub.errors import MiniLoraError

    with pytest.raises(MiniLoraError, match=message):
        train(tmp_path / "out", base=base, data=data, **RUN, **said)


def test_an_adapter_is_kept_once(base, data, tmp_path):
    train(tmp_path / "first", method="lora", base=base, data=data, r=2, **RUN)
    for name, way in (("again", tmp_path / "first"), ("there", tmp_path / "x" / ".." / "first")):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(TrainingError, match="two are the same adapter: leave one out"):
            train(tmp_path / name, method="lora", base=base, data=data, keep=[str(tmp_path / "first"), str(way)], **RUN)
        assert not (tmp_path / name).exists()
