"""The shipped adapters: what their cards say is what was measured, and measuring again gives the same."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from evidence.plan import ADAPTERS, FEW_SHOT, METHODS, STEPS, TASKS
from evidence.report import general
from evidence.store import BASE, Store

from minilora_hub.adapter_folder.results import Results
from minilora_hub.evaluation import metrics
from minilora_hub.evaluation import report as told
from minilora_hub.evaluation.run import evaluate
from minilora_hub.evaluation.settings import held_out_key
from minilora_hub.evaluation.tasks.registry import TASKS as KNOWN

CARDS = Path(__file__).parents[2] / "model_cards"
SAMPLED, ITEMS = "dates", 40
"""The task of whose held-out formats so many items are measured again."""


def folder(method: str) -> Path:
    return CARDS / f"smollm2-135m-{method}"


def mean(scores: str) -> float:
    return round(statistics.fmean(map(int, scores)), 4)


@pytest.fixture(scope="module")
def store() -> Store:
    return Store()


@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_of_a_card_are_those_of_its_run(store, method):
    """Exact match, JSON field F1 and perplexity, the adapter's and the base's, item for item in the results' files."""
    (run,), base = store.done("seeds", method=method, seed=0), store.read(BASE)
    results = Results.load(folder(method))
    rows = {(row.task, row.metric): row for row in results.evaluation}
    for task in TASKS:
        for key, title in (
            (task, KNOWN[task].title),
            (held_out_key(task), f"{KNOWN[task].title}, in formats that are not in training"),
        ):
            row = rows.pop((title, told.EXACT))
            assert row.n == len(run["scores"][key]["exact"])
            assert row.value == mean(run["scores"][key]["exact"])
            assert row.interval == pytest.approx(
                metrics.mean_interval(tuple(map(float, run["scores"][key]["exact"]))), abs=1e-4
            )
            for part in row.parts:
                items = KNOWN[task].items("held_out" if key != task else "test")
                chosen = [
                    score
                    for item, score in zip(items, run["scores"][key]["exact"], strict=True)
                    if part.name == f"difficulty {item.difficulty}"
                ]
                assert (part.n, part.value) == (len(chosen), mean("".join(chosen)))
            assert row.base_value == mean(base["scores"][key]["exact"])
            assert (row.few_shot, row.few_shot_value) == (FEW_SHOT, mean(base["few_shot"][key]["exact"]))
            if KNOWN[task].kind == "json":
                row = rows.pop((title, told.F1))
                assert row.value == pytest.approx(statistics.fmean(run["scores"][key]["f1"]), abs=1e-4)
    together = rows.pop((f"{', '.join(TASKS)} together", told.EXACT))
    assert together.value == pytest.approx(statistics.fmean(mean(run["scores"][t]["exact"]) for t in TASKS), abs=1e-4)
    text = rows.pop(("general text", told.PERPLEXITY))
    assert text.value == pytest.approx(general(run), abs=2e-4)
    assert text.base_value == pytest.approx(general(base), abs=2e-4)
    assert rows == {}
    assert results.parameters == run["parameters"]
    assert results.training is not None
    assert (results.training.steps, results.training.seconds) == (STEPS, run["seconds"])
    if "mix" in method:
        assert {use.task for use in results.router} >= {KNOWN[task].title for task in TASKS}


def test_methods_are_of_one_size():
    """Trainable parameters within 5%, and each file of weights below 10 MB."""
    sizes = {method: Results.load(folder(method)).parameters for method in METHODS}
    assert max(sizes.values()) / min(sizes.values()) < 1.05
    for method in METHODS:
        assert (folder(method) / "adapter_model.safetensors").stat().st_size < 10_000_000
        card = (folder(method) / "README.md").read_text(encoding="utf-8")
        assert f"--method {method} " in card
        assert all(str(value) in card for value in ADAPTERS[method].values())


@pytest.mark.slow
def test_measuring_again_gives_the_answers_of_the_runs(store):
    """`minilora eval` on all four, as their cards tell it, for one task's held-out formats; nothing kept is used.

    The runs were in bfloat16 on a processor with instructions for it. Here it is float32, which every processor
    computes quickly and which gives other answers to 10 of 1,000 items. A wrong prompt, end of answer or adapter
    changes most answers.
    """
    report = evaluate(
        [folder(method) for method in METHODS],
        base="embedded",
        tasks=(SAMPLED,),
        split="held_out",
        count=ITEMS,
        few_shot=0,
        dtype="float32",
        cache=None,
    )
    runs = [store.read(BASE), *(store.done("seeds", method=method, seed=0)[0] for method in METHODS)]
    for run, model in zip(runs, report.models, strict=True):
        then = run["scores"][held_out_key(SAMPLED)]["exact"][:ITEMS]
        now = "".join(str(int(score)) for score in model.scores[SAMPLED].exact)
        assert len(now) == len(then) == ITEMS
        assert sum(a != b for a, b in zip(now, then, strict=True)) <= ITEMS // 10, (now, then)
