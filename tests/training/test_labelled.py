"""Training on labelled rows: classes of texts, tags of words, a new head that is saved with the adapter."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tiny_processors import write_base
from tiny_training import train_until_saved, write_rows
from tiny_training import write_base as write_llama
from torch.nn.functional import cross_entropy

from minilora_hub import DoraConfig
from minilora_hub.errors import DataError, TrainingError
from minilora_hub.publish.checks.folder import check_folder
from minilora_hub.publish.push.build import build
from minilora_hub.remote_code.modeling_minilora import adapted_class
from minilora_hub.training.run import train

SIGNS = {"bad": "aaaa", "good": "zzzz", "odd": "mmmm"}
TEXTS = [{"text": f"{SIGNS[label]} {i}", "label": label} for i in range(8) for label in SIGNS]
WORDS = [
    {"tokens": ["Ana", "is", "in", town], "tags": ["PER", "O", "O", "LOC"]} for town in ("Rome", "Oslo", "Bern") * 4
]
QUICK = {"max_steps": 25, "batch_size": 12, "learning_rate": 2e-2, "r": 4, "save_every": 10}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    kinds = ("SequenceClassification", "TokenClassification")
    made = {kind: write_base(f"AutoModelFor{kind}", folder / kind) for kind in kinds}
    for path in made.values():
        config = json.loads((path / "config.json").read_text())
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (path / "config.json").write_text(json.dumps(config))
    made["llama"] = write_llama(folder / "llama")
    return {name: str(path) for name, path in made.items()}


CASES = {
    "texts": ("SequenceClassification", "dora", "SequenceClassification", TEXTS, "classifier"),
    "words": ("TokenClassification", "dora", "TokenClassification", WORDS, "classifier"),
    "decoder": ("llama", "mixdora", "SequenceClassification", TEXTS, "score"),
}


@pytest.mark.parametrize(
    "case", ["texts", *(pytest.param(name, marks=pytest.mark.slow) for name in ("words", "decoder"))]
)
def test_trained_loaded_and_publishable(case, bases, tmp_path):
    base, method, auto, rows, head = CASES[case]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    plans = []
    result = train(
        tmp_path / "out", method=method, base=bases[base], data=data, license="mit", progress=False,
        on_plan=lambda plan, settings: plans.append(dict(plan.lines())), **QUICK,
    )  # fmt: skip
    assert result.notes == ()
    names = sorted({tag for row in rows for tag in row.get("tags", [row.get("label")])})
    assert plans[0]["labels"] == f"3: {', '.join(names)}"
    assert plans[0]["head"] == f"{head}: new, trained whole"
    assert "end" not in plans[0]
    auto_class = getattr(transformers, f"AutoModelFor{auto}")
    model = auto_class.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.config.modules_to_save == [head]
    assert [model.config.id2label[number] for number in range(3)] == names
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    task = "token-classification" if case == "words" else "text-classification"
    run = transformers.pipeline(task, model=model, tokenizer=tokenizer)
    if case == "words":
        found = {word["start"]: word["entity"] for word in run("Ana is in Oslo", ignore_labels=[])}
        assert {start: found[start] for start in (0, 4, 7, 10)} == {0: "PER", 4: "O", 7: "O", 10: "LOC"}
    else:
        assert [run(row["text"])[0]["label"] for row in rows] == [row["label"] for row in rows]
    settings = {"repo_id": "me/adapter", "base_id": "org/tiny", "base_model": bases[base]}
    built = build(tmp_path / "out", tmp_path / "built", **settings)
    assert built.recorded.reused, built.recorded.reason
    problems = check_folder(built.folder, base_exists=lambda *_: True, base_license=lambda *_: "mit")
    assert [problem for problem in problems if problem.blocking] == []
    card = (built.folder / "README.md").read_text()
    assert f"pipeline_tag: {task}" in card
    assert f"| Labels | {', '.join(names)} |" in card


@pytest.mark.parametrize("case", ["texts", pytest.param("words", marks=pytest.mark.slow)])
def test_the_loss_is_the_cross_entropy_of_the_labels(case, bases, tmp_path):
    base, _, auto, rows, _ = CASES[case]
    rows = [row | {"text": row["text"] * (1 + i % 3)} if "text" in row else row for i, row in enumerate(rows)]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    losses = []
    for micro in (len(rows), 4):
        train(
            tmp_path / f"out{micro}", method="dora", base=bases[base], data=data, max_steps=1, batch_size=len(rows),
            micro_batch_size=micro, r=4, progress=False, record=False,
        )  # fmt: skip
        lines = (tmp_path / f"out{micro}" / "loss.csv").read_text().splitlines()
        losses.append(float(lines[1].split(",")[1]))
    names = sorted({tag for row in rows for tag in row.get("tags", [row.get("label")])})
    model = adapted_class("Dora", f"AutoModelFor{auto}").from_base(bases[base], DoraConfig(r=4), num_labels=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bases[base])
    logits, labels = [], []
    with torch.no_grad():
        for row in rows:
            if case == "texts":
                logits.append(model(**tokenizer(row["text"], return_tensors="pt")).logits)
                labels.append(names.index(row["label"]))
                continue
            ids = tokenizer(" ".join(row["tokens"]), return_tensors="pt")
            starts = [0, 4, 7, 10]  # one token a byte
            logits.append(model(**ids).logits[0, starts])
            labels += [names.index(tag) for tag in row["tags"]]
    expected = cross_entropy(torch.cat(logits), torch.tensor(labels)).item()
    assert losses == pytest.approx([expected, expected], abs=1e-5)


@pytest.mark.slow
def test_a_stopped_run_continues_to_the_same_bytes(bases, tmp_path, monkeypatch):
    data = str(write_rows(tmp_path / "rows.jsonl", TEXTS))
    settings = {"method": "dora", "base": bases["SequenceClassification"], "data": data, "progress": False}
    settings |= {"max_steps": 4, "batch_size": 4, "save_every": 2, "r": 4, "validation": 0.25}
    train(tmp_path / "whole", **settings)
    train_until_saved(monkeypatch, tmp_path / "parts", **settings)
    result = train(tmp_path / "parts", resume=True, progress=False)
    assert result.steps == 4
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*TEXTS[:2], {"text": "x"}], r"rows\.jsonl:3: has no label, which text-classification needs; it has"),
        ([*TEXTS[:2], {"text": "", "label": "bad"}], r"rows\.jsonl:3: text is empty"),
        ([*TEXTS[:2], {"text": "x", "label": ["bad"]}], r"rows\.jsonl:3: label: must be a class .* a list"),
        ([*TEXTS[:2], {"text": "x", "label": 0.5}], r"rows\.jsonl:3: label: must be a class .* a float"),
        ([*TEXTS[:2], {"text": "x", "label": 1}], r"rows\.jsonl:3: has a label that is a int, the one of rows"),
        ([*TEXTS[:2], {"text": "x" * 99, "label": "bad"}], r"rows\.jsonl:3: has 99 tokens, the most is 60"),
        ([TEXTS[0]], r"the rows have 1 label \['bad'\]: needed are two"),
        ([WORDS[0], {"tokens": ["a", "b"], "tags": ["O"]}], r"rows\.jsonl:2: tags: has 1 entries for 2 tokens"),
        (
            [WORDS[0], {"tokens": ["a", 3], "tags": ["O", "O"]}],
            r"rows\.jsonl:2: tokens, entry 2: must be a word",
        ),
        ([WORDS[0], {"tokens": ["a"], "tags": [None]}], r"rows\.jsonl:2: tags, entry 1: must be a class"),
        ([WORDS[0], {"tokens": [], "tags": []}], r"rows\.jsonl:2: tokens must be a list with something in it"),
    ],
)
def test_wrong_rows_are_named(rows, words, bases, tmp_path):
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    base = bases["TokenClassification" if "tokens" in rows[0] else "SequenceClassification"]
    with pytest.raises(DataError, match=words):
        train(tmp_path / "out", method="dora", base=base, data=data, dry_run=True, progress=False, **QUICK)


def test_bad_rows_are_skipped_and_unknown_labels_named(bases, tmp_path):
    base = bases["SequenceClassification"]
    data = str(write_rows(tmp_path / "rows.jsonl", [*TEXTS, {"text": "x" * 99, "label": "bad"}]))
    result = train(
        tmp_path / "out", method="dora", base=base, data=data, dry_run=True, skip_bad_rows=True, progress=False
    )
    assert result.skipped == ("rows.jsonl:25: has 99 tokens, the most is 60: shorten it, or --truncate",)
    other = str(write_rows(tmp_path / "other.jsonl", [{"text": "x", "label": "fine"}]))
    arguments = {"validation_data": other, "skip_bad_rows": False, "truncate": True}
    with pytest.raises(DataError, match=r"other\.jsonl:1: the label 'fine' is not one of the training rows', \['bad'"):
        train(tmp_path / "out", method="dora", base=base, data=data, dry_run=True, progress=False, **arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "lora"}, r"method='lora' on rows for text-classification: must be one of dora, mixlora, mixdora"),
        ({"method": "dora", "batching": "packed"}, r"batching='packed' on rows for text-classification"),
        ({"method": "dora", "loss_on": "all"}, r"loss_on='all' on rows for text-classification: leave it out"),
        ({"method": "dora", "max_length": 9999}, r"max_length=9999: the base's context has \d+ tokens"),
        ({"method": "dora", "task": "speech"}, r"task='speech': must be one of text-generation, text-classification"),
        ({"method": "dora", "task": "token-classification"}, r"has no tokens and no tags, which token-class"),
    ],
)
def test_settings_that_do_not_go_with_labels(changes, words, bases, tmp_path):
    data = str(write_rows(tmp_path / "rows.jsonl", TEXTS))
    settings = {"base": bases["SequenceClassification"], "data": data, "dry_run": True, "progress": False}
    with pytest.raises((TrainingError, DataError), match=words):
        train(tmp_path / "out", **settings, **changes)


def test_texts_with_labels_can_be_generated_instead(bases, tmp_path):
    data = str(write_rows(tmp_path / "rows.jsonl", TEXTS))
    settings = {"method": "dora", "base": bases["llama"], "data": data, "dry_run": True, "progress": False}
    assert train(tmp_path / "out", **settings).plan.labels == ("bad", "good", "odd")
    plan = train(tmp_path / "out", task="text-generation", **settings).plan
    assert (plan.labels, plan.task, plan.ends) == ((), "text-generation", ("<|end|>",))


def test_a_base_that_has_the_head_keeps_it(bases, tmp_path):
    """Its labels keep their order, and the head is not saved."""
    labels = {"id2label": {0: "odd", 1: "good", 2: "bad"}, "label2id": {"odd": 0, "good": 1, "bad": 2}}
    auto = transformers.AutoModelForSequenceClassification
    auto.from_pretrained(bases["SequenceClassification"], **labels).save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(bases["SequenceClassification"]).save_pretrained(tmp_path / "base")
    data = str(write_rows(tmp_path / "rows.jsonl", TEXTS))
    settings = {"max_steps": 2, "batch_size": 4, "r": 4, "progress": False, "record": False}
    result = train(tmp_path / "out", method="dora", base=str(tmp_path / "base"), data=data, **settings)
    assert dict(result.plan.lines())["head"] == "the base's own, frozen"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("modules_to_save") is None
    assert config["text_config"]["id2label"] == {"0": "odd", "1": "good", "2": "bad"}
