"""The measures of routing, on cases whose values are known, and the runs on a tiny base."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from evidence import routers, routing_measures, routing_report
from evidence.causes import CAUSES, Sizes
from evidence.plan import ADAPTERS
from evidence.routing_measures import agreement, by_chance, choice_taken_away, information, mixtures_of, read
from tiny_training import write_base

from minilora_hub import MixLoraConfig, MixLoraForCausalLM
from minilora_hub.bases.loading import load_tokenizer
from minilora_hub.bases.resolving import resolve_base
from minilora_hub.documents import write_whole
from minilora_hub.evaluation.tasks.items import Item
from minilora_hub.remote_code.routing_record import record_routing
from minilora_hub.training.settings import make_settings

TASKS = ["a"] * 6 + ["b"] * 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base):
    model = MixLoraForCausalLM.from_base(base, MixLoraConfig(r=4, num_experts=4), seed=3).eval()
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
            if name.endswith("router"):
                parameter.normal_(0, 1, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.fixture
def examples(base):
    tokenizer = load_tokenizer(resolve_base(str(base)))
    texts = [("short", "yes"), ("a longer question", "no"), ("mid size", "perhaps so"), ("x", "1")] * 3
    items = [Item("a", "test", f"{prompt} {number}", answer, 1, "") for number, (prompt, answer) in enumerate(texts)]
    return routing_measures.encoded(items, tokenizer)


def test_information_of_known_tables():
    """A task that names its expert: one bit of two tasks. A choice that ignores the task: none. Between: by hand."""
    named = np.array([[[9, 0]] * 6 + [[0, 1]] * 6], dtype=float)  # unequal counts: the tasks are equally frequent
    ignored = np.array([[[3, 1]] * 6 + [[6, 2]] * 6], dtype=float)
    half = np.array([[[1, 0]] * 6 + [[1, 1]] * 6], dtype=float)
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    found = information(np.concatenate([named, ignored, half]), TASKS)
    assert found == pytest.approx([1.0, 0.0, expected])


def test_chance_is_above_zero_and_below_what_is_there():
    rng = np.random.default_rng(1)
    noise = rng.multinomial(20, [0.25] * 4, size=(1, 12)).astype(float)
    told = np.array([[[9, 1, 0, 0]] * 6 + [[0, 0, 9, 1]] * 6], dtype=float)
    mean, most = by_chance(np.concatenate([noise, told]), TASKS, shuffles=200)
    assert 0 < mean[0] < most[0]
    found = information(np.concatenate([noise, told]), TASKS)
    assert found[0] < most[0]
    assert found[1] > most[1]


def test_rows_are_read_as_each_alone(model, examples):
    """Neither padding nor the other rows change a row's loss, choices and entropy."""
    together = read(model, examples)
    for place, example in enumerate(examples):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad(), record_routing() as record:
            loss = model(input_ids=ids, labels=torch.tensor([example.labels])).loss
        assert together.losses[place] == pytest.approx(loss.item(), abs=1e-5)
        start = next(n for n in range(99) if len({tuple(one.input_ids[: n + 1]) for one in examples}) > 1)
        for layer, selected in enumerate(record.selected):
            expected = torch.bincount(selected[0, start:].flatten(), minlength=4)
            assert together.counts[layer, place].tolist() == expected.tolist()
    assert ((together.entropy > 0) & (together.entropy < 1)).all()


def test_mixtures_may_have_different_numbers_of_experts(base, examples):
    config = MixLoraConfig(r=4, num_experts=[2, 4])
    model = MixLoraForCausalLM.from_base(base, config, seed=3).eval()
    found = read(model, examples)
    assert found.counts.shape == (2, len(examples), 4)
    assert (found.counts[0, :, 2:] == 0).all()
    assert (found.counts[0, :, 0] == found.counts[0, :, 1]).all()  # both of two serve every token
    assert ((found.entropy > 0.9) & (found.entropy < 1)).all()  # a fresh router prefers none
    with choice_taken_away(mixtures_of(model), "even"):
        even = read(model, examples)
    assert (even.counts[0, :, :2] == even.counts[1, :, :2]).all()


def test_the_complement_serves_with_the_others(model, examples):
    """With 2 of 4 experts every count is turned round, and afterwards the model is as it was."""
    before = read(model, examples)
    with choice_taken_away(mixtures_of(model)[:1], "complement"):
        other = read(model, examples)
    tokens = before.counts[0].sum(-1, keepdims=True) / 2
    assert (other.counts[0] == tokens - before.counts[0]).all()
    assert np.abs(other.losses - before.losses).max() > 1e-4
    with choice_taken_away(mixtures_of(model), "even"):
        even = read(model, examples)
    assert even.entropy == pytest.approx(1)
    assert (even.counts == even.counts[..., :1]).all()
    again = read(model, examples)
    assert (again.losses == before.losses).all()


def test_without_b_no_loss_reaches_the_routers(base, examples):
    """Before the first step every expert computes what the base does: only the balance loss moves a router."""
    model = MixLoraForCausalLM.from_base(base, MixLoraConfig(r=4, num_experts=4)).eval()
    found = routing_measures.gradients(model, examples)
    assert max(found["loss"]) < 1e-4 * min(found["balance"])  # rounding
    assert routing_measures.gradients(model, examples, 10.0)["balance"] == pytest.approx(
        [10 * value for value in found["balance"]], rel=1e-3
    )


def test_agreement_of_equal_opposed_and_random_gradients():
    one = [torch.tensor([1.0, 2.0])]
    assert agreement([one, one, one]) == pytest.approx(1)
    assert agreement([one, [-one[0]]]) == pytest.approx(-1)
    noise = torch.randn(50, 2000, generator=torch.Generator().manual_seed(0))
    assert abs(agreement([[row] for row in noise])) < 0.01


@pytest.mark.slow
def test_causes_are_made_and_measured(base, tmp_path, monkeypatch):
    """On a tiny base: one that only begins, one with a setting of its own, and both that need LoRAs for one task."""
    from evidence.measure import write_data

    monkeypatch.setitem(routers.SETTINGS, "base", str(base))
    monkeypatch.setattr(routing_report, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(routers, "SHIPPED", tmp_path / "adapters" / "baseline-seed0-steps4-rows2")
    write_data(tmp_path / "data")
    (tmp_path / "results").mkdir()
    sizes = Sizes(steps=4, rows=2, items=2, windows=1)
    for name in ("baseline", "fresh", "apart", "tasks"):
        result = routers.measured(name, tmp_path, sizes, 0)
        assert len(result["losses"]) == 8
        assert all(loss > 0 for loss in result["losses"])
        write_whole(tmp_path / "results" / sizes.file(name, 0), json.dumps(result))
        if name != "tasks":
            assert len(result["load"]) == 2
            assert [sum(layer) for layer in result["load"]] == pytest.approx([1, 1], abs=1e-3)
        if name == "fresh":
            assert all(0 < share < 1 for share in result["moved_in_training"])
    made = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert {"dates-seed0-steps4-rows2", "apart-seed0-steps4-rows2-start"} <= made
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in routing_report.report().splitlines()
            if line.startswith("| ")}  # fmt: skip
    assert [CAUSES[name].title in rows for name in ("fresh", "baseline", "apart", "tasks")] == [True] * 4
    losses = json.loads((tmp_path / "results" / sizes.file("baseline", 0)).read_text())["losses"]
    assert float(rows[CAUSES["baseline"].title][4]) == pytest.approx(sum(losses) / 8, abs=6e-4)


def test_settings_differ_in_the_cause_alone():
    """Every cause is a set of known settings, and the thirds have as many expert parameters as the baseline."""
    for cause in CAUSES.values():
        settings = routers.SETTINGS | ADAPTERS["mixlora"] | cause.changed
        settings = {name: value for name, value in settings.items() if name != "record"}
        make_settings(settings | {"method": "mixlora", "data": "rows.jsonl"})
    for third in ("first", "middle", "last"):
        changed = CAUSES[f"{third}-third"].changed
        layers = {name.split(".")[1] for name in changed["target_modules"] if name.startswith("layers.")}
        assert len(layers) * changed["expert_r"] == 30 * ADAPTERS["mixlora"]["expert_r"]


def test_favourites_of_even_and_of_fixed_loads():
    assert routing_report.favourites([[0.25] * 4, [0.0, 0.5, 0.5, 0.0]]) == pytest.approx(75)
    assert routing_report.favourites([[0.25] * 4]) == pytest.approx(50)
