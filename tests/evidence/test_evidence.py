"""The evidence: methods of equal size, verdicts that follow from scores, and a README that says what was measured."""

from __future__ import annotations

import json
import math
import random

import pytest
from evidence import report
from evidence.plan import (
    ADAPTERS,
    LEARNING_RATES,
    METHODS,
    SEEDS,
    SINGLE_STEPS,
    STEPS,
    TASKS,
    VARIANTS,
    final_runs,
    full_runs,
    sweep_runs,
)
from evidence.store import BASE, CODE, Store

from minilora_hub.evaluation.settings import held_out_key
from minilora_hub.training.settings import make_settings

ITEMS = 200


def result(run, rate_right, noise_seed, tokens=1000.0):
    """What a run would have come to whose answers are right so often."""
    draw = random.Random(noise_seed)
    scores = {}
    for task in TASKS:
        for key in (task, held_out_key(task)):
            scores[key] = {"exact": "".join(str(int(draw.random() < rate_right)) for _ in range(ITEMS))}
    load = [[0.25] * 4] * 2
    return {
        "run": run.to_dict(),
        "parameters": 3_700_000,
        "bytes": 7_400_000,
        "seconds": 10.0,
        "validation_loss": 0.5,
        "loss": [[step, 1.0 / step] for step in range(1, run.steps + 1)],
        "scores": scores,
        "general_text": {"name": "text", "sha256": "0", "tokens": [255, 255], "nll": [tokens, tokens]},
        "routers": {task: {"load": load, "entropy": [0.5, 0.5]} for task in TASKS},
    }


@pytest.fixture
def store(tmp_path):
    """Sweeps done; LoRA is right in 40%, DoRA as often, MixLoRA in 60%, MixDoRA has no runs yet."""
    store = Store(tmp_path)
    for run in sweep_runs():
        loss = 0.5 if run.learning_rate == LEARNING_RATES[2] else 1.0
        store.write(run.name, {"run": run.to_dict(), "validation_loss": loss, "seconds": 5.0})
    for run in full_runs(store.best()):
        loss = 0.4 if run.learning_rate == LEARNING_RATES[2] else 0.3
        store.write(run.name, {"run": run.to_dict(), "validation_loss": loss, "seconds": 30.0})
    rates = {"lora": 0.4, "dora": 0.4, "mixlora": 0.6}
    for run in final_runs(store.rates()):
        if run.method in rates:
            store.write(run.name, result(run, rates[run.method], f"{run.method}{run.seed}{run.data}"))
    run = final_runs(store.rates())[0]
    base = result(run, 0.1, "base")
    store.write(BASE, base | {"few_shot": base["scores"]})
    return store


def test_methods_differ_in_nothing_but_the_adapter_and_its_learning_rate():
    own = {"method", "learning_rate", *(name for fields in ADAPTERS.values() for name in fields)}
    runs = [run for run in final_runs(dict.fromkeys(METHODS, 1e-3)) if run.part == "seeds" and run.seed == 0]
    shared = [{name: value for name, value in run.settings().items() if name not in own} for run in runs]
    assert len(shared) == len(METHODS)
    assert all(settings == shared[0] for settings in shared)
    grids = {method: {run.learning_rate for run in sweep_runs() if run.method == method} for method in METHODS}
    assert all(grid == set(LEARNING_RATES) for grid in grids.values())


def test_methods_have_equally_many_parameters_within_five_percent():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
    from minilora_hub.training.lora_model import LoraConfig, LoraForCausalLM

    # SmolLM2-135M's shapes, one layer of its thirty: every method has the same per layer.
    shape = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=8,
        head_dim=64,
    )
    classes = {"lora": (LoraConfig, LoraForCausalLM), "dora": (DoraConfig, DoraForCausalLM)}
    sizes = {}
    for method, fields in ADAPTERS.items():
        settings = make_settings({"method": method, "base": "embedded", "data": "x.jsonl"}, fields)
        config, model = classes.get(method, (MixLoraConfig, MixLoraForCausalLM))
        torch.manual_seed(0)
        adapted = model.from_base(LlamaForCausalLM(shape), config(**settings.recipe.adapter))
        sizes[method] = sum(parameter.numel() for parameter in adapted.adapter_parameters().values())
    assert max(sizes.values()) / min(sizes.values()) < 1.05, sizes
    assert 2 * 30 * max(sizes.values()) < 10_000_000  # bytes in bfloat16


def test_results_of_other_code_are_told_apart(store):
    assert store.of_other_code() == []
    name = sweep_runs()[0].name
    assert store.read(name)["code"] == CODE
    for other in ({"code": "0"}, {}):
        value = {key: value for key, value in store.read(name).items() if key != "code"}
        store.path(name).write_text(json.dumps(value | other))
        assert store.of_other_code() == [name]


def test_each_task_alone_is_seen_as_often_as_in_the_mix():
    assert len(TASKS) * SINGLE_STEPS == STEPS


def test_run_names_are_told_apart_and_commands_hold_the_settings():
    runs = sweep_runs() + full_runs(dict.fromkeys(METHODS, (1e-3,))) + final_runs(dict.fromkeys(METHODS, 1e-3))
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        command = run.command()
        assert f"--method {run.method} " in command
        assert f"--lr {run.learning_rate}" in command or f"--learning-rate {run.learning_rate}" in command
        assert f"--max-steps {run.steps} " in command
        for name, value in (ADAPTERS[run.method] | VARIANTS.get(run.variant, {})).items():
            assert f"--rank {value}" in command if name == "r" else f"--set {name}={value}" in command


def test_a_learning_rate_is_chosen_in_two_rounds(tmp_path):
    """The two best after a short run are tried at full length; NaN is no candidate; nothing is chosen too early."""
    store, losses = Store(tmp_path), dict(zip(LEARNING_RATES, (0.9, 0.8, 0.7, None), strict=True))
    runs = [run for run in sweep_runs() if run.method == "dora"]
    for run in runs[:-1]:
        store.write(run.name, {"validation_loss": losses[run.learning_rate]})
    assert store.best() == {}
    store.write(runs[-1].name, {"validation_loss": losses[runs[-1].learning_rate]})
    assert store.best() == {"dora": (LEARNING_RATES[2], LEARNING_RATES[1])}
    first, second = full_runs(store.best())
    store.write(first.name, {"validation_loss": 0.5})
    assert store.rates() == {}
    store.write(second.name, {"validation_loss": 0.4})
    assert store.rates() == {"dora": LEARNING_RATES[1]}
    assert {run.method for run in store.runs() if run.part not in ("sweep", "full")} == {"dora"}


def test_a_run_at_full_length_is_the_first_seed_s():
    """What was trained to choose a learning rate is what is measured, and not trained again."""
    (full,) = full_runs({"dora": (1e-3,)})
    seed, other = [run for run in final_runs({"dora": 1e-3}) if run.part == "seeds"][:2]
    assert (full.adapter, full.settings(), full.about()) == (seed.adapter, seed.settings(), seed.about())
    assert other.adapter != seed.adapter


def test_verdicts_follow_from_items_and_seeds(store):
    rows = {cells[0]: cells[1:] for cells in of_exact_match(store)}
    assert [row[-1] for row in rows.values()] == ["no", "yes", "yes"]  # LoRA less DoRA; either less MixLoRA
    right = {method: report.exact_groups(store.done("seeds", method=method)) for method in ("lora", "mixlora")}
    means = [100 * sum(group.mean() for group in groups) / len(groups) for groups in right.values()]
    assert rows["LoRA less MixLoRA"][0] == f"{means[0] - means[1]:+.1f}"
    assert not any("MixDoRA" in name for name in rows)


def of_exact_match(store):
    return [cells for cells in cells_of(report.differences(store)) if " less " in cells[0]][:3]


def cells_of(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_one_seed_is_never_larger_than_noise(store):
    for run in final_runs(store.rates()):
        if run.part == "seeds" and run.method in ("lora", "mixlora") and run.seed:
            store.path(run.name).unlink()
    (row,) = [cells for cells in of_exact_match(store) if cells[0] == "LoRA less MixLoRA"]
    assert row[3:] == ["", "", "no"]


def test_perplexity_is_compared_in_percent(store):
    """A tenth more of -ln p in every window of one method: its perplexity is exp(0.1 * mean) times the other's."""
    for run in store.done("seeds", method="dora"):
        name = next(one.name for one in final_runs(store.rates()) if one.to_dict() == run["run"])
        run["general_text"]["nll"] = [1100.0, 1100.0]
        store.write(name, run)
    rows = cells_of(report.differences(store))
    (row,) = [row for row in rows[len(rows) // 2 :] if row[0] == "LoRA less DoRA"]
    assert row[1] == f"{100 * (math.exp(-100 / 255) - 1):+.1f}"


def test_the_table_holds_the_means_of_the_results(store):
    runs = store.done("seeds", method="mixlora")
    dates = [100 * run["scores"]["dates"]["exact"].count("1") / ITEMS for run in runs]
    (row,) = [line for line in report.table(store) if line.startswith("| MixLoRA ")]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[0].startswith(f"{sum(dates) / len(dates):.1f} ± ")
    assert cells[-1] == "50.48 ± 0.00"  # exp(1000 / 255)
    assert len(runs) == len(SEEDS)


def test_the_sweep_is_told(store):
    rows = report.sweep_table(store)
    assert rows[0] == "| learning rate | 0.0005 | 0.0015 | 0.0045 | 0.0135 |"
    cells = "1.000 | 1.000 (0.300) | 0.500 (0.400) | 1.000"
    assert rows[2:] == [f"| {title} | {cells} |" for title in ("LoRA", "DoRA", "MixLoRA", "MixDoRA")]


def test_trials_stand_beside_the_runs_they_vary(store):
    """The first seeds of LoRA and MixLoRA, then each variant, with the numbers of their own results."""
    rows = report.trials(store)
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["LoRA", "MixLoRA", *report.VARIANT_TITLES.values()]
    (run,) = [run for run in store.done("trial") if run["run"]["variant"] == "all-active"]
    cells = [cell.strip() for cell in rows[4].split("|")[2:-1]]
    assert cells == ["0.500", *(f"{report.share(run, task):.1f}" for task in TASKS), *cells[5:]]
    assert report.VARIANT_TITLES.keys() == VARIANTS.keys()


def test_routers_are_told(store):
    """An even load of four experts, and half of the largest entropy."""
    (line,) = [line for line in report.router_lines(store) if line.startswith("- MixLoRA")]
    assert "gets 25 to 25 % of a layer's slots (even: 25 %)" in line
    assert line.endswith("0.50 of the largest possible")


def test_incomplete_runs_are_said_to_be_incomplete(store, tmp_path):
    assert "These runs are not complete: 9 of 12 are there." in report.section(store)
    nothing = report.section(Store(tmp_path / "none"))
    assert "not complete: 0 of 12" in nothing
    assert "|" not in nothing


def test_the_matrix_is_over_the_same_items(store, monkeypatch):
    found = report.matrix(store, "mixlora")
    assert set(found) == {*TASKS, "mix"}
    (run,) = store.done("seeds", method="mixlora", seed=0)
    first = run["scores"]["dates"]["exact"][: report.TEST_ITEMS["single"]]
    assert found["mix"]["dates"] == pytest.approx(100 * first.count("1") / len(first))


def test_pictures_are_drawn_from_what_there_is(store, tmp_path, monkeypatch):
    from evidence import pictures

    monkeypatch.setattr(pictures, "FOLDER", tmp_path / "pictures")
    assert {path.name for path in pictures.draw_all(store)} == {"matrix.png", "expert_load.png", "loss.png"}
    assert pictures.draw_all(Store(tmp_path / "none")) == []


def test_what_one_task_alone_gives_is_beside_all_together(store):
    """In both dtypes, where there are runs in both; a method whose runs are not complete has its mix only."""
    lines = report.alone(store)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}
    runs = [run for run in store.runs() if run.part == "single" and run.method == "mixlora"]
    assert [run.data for run in runs] == [*TASKS]
    own = [100 * store.read(run.name)["scores"][run.data]["exact"].count("1") / ITEMS for run in runs]
    cells = " | ".join(f"{value:.1f}" for value in [*own, sum(own) / 4])
    assert rows["MixLoRA, each task alone (bfloat16)"].endswith(f"| {cells} |")
    assert "MixLoRA, each task alone (float32)" not in rows
    again = store.again_in_float32()
    for run in runs:
        again.write(run.name, result(run, 1.0, 1))
    (line,) = [line for line in report.alone(store) if "MixLoRA, each task alone (float32)" in line]
    assert line.endswith("| 100.0 | 100.0 | 100.0 | 100.0 | 100.0 |")
    assert report.alone(Store(store.folder / "none")) == []
