"""Classifiers on labelled rows: the numbers, their intervals, what stands beside them, and where they are written."""

from __future__ import annotations

import json
import random

import pytest
import torch
import transformers
from scipy.stats import binomtest
from tiny import fill_adapter, tiny_config
from tiny_processors import CLASSES, write_base
from tiny_training import write_rows

from minilora_hub.adapter_folder.results import Results
from minilora_hub.cli import main
from minilora_hub.errors import AdapterError, DataError
from minilora_hub.evaluation.classification import measure
from minilora_hub.evaluation.metrics import label_counts, macro_f1, macro_f1_interval, share_interval
from minilora_hub.publish.card.render import render_card
from minilora_hub.remote_code.modeling_minilora import adapted_class

TEXTS = [{"text": f"{'abcxyz'[i % 6] * 5} {i}", "label": ("good", "bad", "odd", "good")[i % 4]} for i in range(20)]
WORDS = [
    {"tokens": ["Ana", "is", "in", "Oslo"][: 2 + i % 3], "tags": ["bad", "odd", "odd", "good"][: 2 + i % 3]}
    for i in range(9)
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Adapters with new heads, random and not trained; one on a base that has the head."""
    folder, made = tmp_path_factory.mktemp("classifiers"), {}
    for kind in ("SequenceClassification", "TokenClassification"):
        base = write_base(f"AutoModelFor{kind}", folder / f"base-{kind}")
        made[kind] = (base, folder / kind)
    auto = transformers.AutoModelForSequenceClassification
    torch.manual_seed(3)
    auto.from_pretrained(made["SequenceClassification"][0], **CLASSES).save_pretrained(folder / "base-whole")
    transformers.AutoTokenizer.from_pretrained(folder / "base-SequenceClassification").save_pretrained(
        folder / "base-whole"
    )
    made["whole"] = (folder / "base-whole", folder / "whole")
    for name, (base, target) in made.items():
        kind = "SequenceClassification" if name == "whole" else name
        model = adapted_class("Dora", f"AutoModelFor{kind}").from_base(str(base), tiny_config("dora"), **CLASSES)
        fill_adapter(model)
        model.eval().save_pretrained(target)
    return {name: target for name, (_, target) in made.items()}


def test_numbers_by_hand():
    """scikit-learn 1.7: accuracy_score and f1_score(average="macro") of these lists."""
    wanted = [[0], [0], [1], [1], [1], [2], [2], [0]]
    said = [[0], [1], [1], [1], [0], [2], [1], [0]]
    counts = label_counts(wanted, said, labels=4)  # label 3 occurs nowhere, and does not count
    assert counts.accuracy == 5 / 8
    # label 0: precision 2/3, recall 2/3; label 1: 2/4, 2/3; label 2: 1/1, 1/2
    assert [counts.f1(label) for label in range(4)] == pytest.approx([2 / 3, 4 / 7, 2 / 3, 0])
    assert macro_f1(counts) == pytest.approx((2 / 3 + 4 / 7 + 2 / 3) / 3)
    # a label that is only said counts with 0
    assert macro_f1(label_counts([[0], [0]], [[0], [1]], labels=2)) == pytest.approx((2 / 3 + 0) / 2)
    assert [counts.support(label) for label in range(4)] == [3, 3, 2, 0]


def test_intervals():
    rng = random.Random(5)
    wanted = [[rng.randrange(3)] for _ in range(60)]
    said = [[row[0] if rng.random() < 0.7 else rng.randrange(3)] for row in wanted]
    counts = label_counts(wanted, said, 3)
    right = sum(one == other for one, other in zip(wanted, said, strict=True))
    expected = binomtest(right, 60).proportion_ci(0.95, method="wilson")
    assert share_interval(counts) == pytest.approx((expected.low, expected.high))
    low, high = macro_f1_interval(counts)
    assert low < macro_f1(counts) < high
    # An own bootstrap agrees.
    drawn = []
    for _ in range(1500):
        places = [rng.randrange(60) for _ in range(60)]
        drawn.append(macro_f1(label_counts([wanted[p] for p in places], [said[p] for p in places], 3)))
    drawn.sort()
    assert (low, high) == pytest.approx((drawn[37], drawn[1462]), abs=0.02)
    assert macro_f1_interval(label_counts(wanted, wanted, 3)) is None  # a bootstrap would have no width
    assert macro_f1_interval(label_counts([[0]], [[1]], 3)) is None
    # Rows of several items are resampled as rows: two rows of equal items are as uncertain as two items.
    low, high = share_interval(label_counts([[0] * 50, [1] * 50], [[0] * 50, [0] * 50], 2))
    assert (low, high) == (0, 1)


def right_of(folder, rows, words):
    """(right, predictions) of a model that is loaded as users load it, one row after the other."""
    auto = transformers.AutoModelForTokenClassification if words else transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    said = []
    for row in rows:
        text = " ".join(row["tokens"]) if words else row["text"]
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        starts = [sum(len(word) + 1 for word in row["tokens"][:i]) for i in range(len(row["tokens"]))] if words else []
        classes = logits[starts].argmax(-1).tolist() if words else [int(logits.argmax())]
        said.append([model.config.id2label[number] for number in classes])
    wanted = [row["tags"] if words else [row["label"]] for row in rows]
    return wanted, said


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_against_rows_one_by_one(kind, adapters, tmp_path):
    words, rows = kind[0] == "T", WORDS if kind[0] == "T" else TEXTS
    file = str(write_rows(tmp_path / "rows.jsonl", rows))
    one = measure([adapters[kind]], [file], batch_size=7).models[0]
    wanted, said = right_of(adapters[kind], rows, words)
    names = [[one.labels[number] for number in row] for row in one.predictions]
    assert names == said
    pairs = [(a, b) for x, y in zip(wanted, said, strict=True) for a, b in zip(x, y, strict=True)]
    accuracy, f1 = one.rows
    assert accuracy.value == round(sum(a == b for a, b in pairs) / len(pairs), 4)
    assert accuracy.n == f1.n == len(pairs)
    assert one.confusion() == [[pairs.count((a, b)) for b in one.labels] for a in one.labels]
    most = max(one.labels, key=[a for a, _ in pairs].count)
    assert one.majority == most
    assert accuracy.base_value == round(sum(a == most for a, _ in pairs) / len(pairs), 4)
    assert f"beside the adapter stands the most frequent label, '{most}', for all rows" in accuracy.note
    assert ("each word counts" in accuracy.note) == words
    assert {part.name: part.n for part in f1.parts} == {a: [x for x, _ in pairs].count(a) for a, _ in pairs}


def test_a_base_with_the_head_is_measured_itself(adapters, tmp_path):
    file = str(write_rows(tmp_path / "rows.jsonl", TEXTS))
    one = measure([adapters["whole"]], [file]).models[0]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(adapters["whole"].parent / "base-whole")
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapters["whole"].parent / "base-whole")
    with torch.no_grad():
        said = [int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in TEXTS]
    assert [row[0] for row in one.base] == said
    assert one.majority is None
    assert one.rows[0].note is None


def test_the_command_writes_results_and_the_card_shows_them(adapters, tmp_path, capsys):
    file = str(write_rows(tmp_path / "rows.jsonl", TEXTS))
    folder = adapters["SequenceClassification"]
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(folder), "--data", file, "--count", "12"])
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    assert "rows.jsonl: accuracy, 12 items" in printed.out
    assert "always 'good'" in printed.out
    assert "good: " in printed.err
    rows = Results.load(folder).evaluation
    assert [(row.metric, row.n) for row in rows] == [("accuracy", 12), ("macro-F1", 12)]
    assert "--data rows.jsonl --count 12" in rows[0].command
    card = render_card(folder, repo_id="ana/x")
    assert f"| rows.jsonl | accuracy | 12 | {rows[0].base_value:g} | **{rows[0].value:g}**" in card
    assert "The same by label:" in card
    with pytest.raises(SystemExit):
        main(["eval", str(folder), "--data", file, "--json"])
    document = json.loads(capsys.readouterr().out)["models"][0]
    assert sum(map(sum, document["confusion"])) == 20
    assert document["labels"] == ["bad", "good", "odd"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x", "label": "fine"}, r"rows\.jsonl:21: the label 'fine' is not one of the adapter's, \['bad', 'go"),
        ({"text": "x"}, r"rows\.jsonl:21: has no label, which text-classification needs"),
        ({"text": "x" * 99, "label": "bad"}, r"rows\.jsonl:21: has 99 tokens, the most is 60: shorten it, or --trunc"),
    ],
)
def test_wrong_rows_are_named(row, words, adapters, tmp_path):
    file = str(write_rows(tmp_path / "rows.jsonl", [*TEXTS, row]))
    with pytest.raises(DataError, match=words):
        measure([adapters["SequenceClassification"]], [file])


def test_wrong_arguments(adapters, tmp_path, capsys):
    file = str(write_rows(tmp_path / "rows.jsonl", TEXTS))
    for arguments, words in {
        ("--data", file, "--few-shot", "2"): "--few-shot: only applies to the built-in tasks: leave it out with --data",
        ("--truncate",): "--truncate: must come with --data",
        ("--data", file, "--lm-eval", "arc_easy"): "--data: leave it out with --lm-eval",
        ("--data", file, "--dtype", "int8"): "dtype='int8': must be float32 or bfloat16 for labelled rows",
        (): "is for AutoModelForSequenceClassification: measure it on rows with labels, --data FILE",
    }.items():
        with pytest.raises(SystemExit) as ended:
            main(["eval", str(adapters["SequenceClassification"]), *arguments])
        assert ended.value.code in (1, 2)
        assert words in capsys.readouterr().err


def test_other_adapters_are_not_classifiers(tmp_path):
    base = write_base("AutoModel", tmp_path / "base")
    adapted_class("Dora", "AutoModel").from_base(str(base), tiny_config("dora")).save_pretrained(tmp_path / "x")
    file = str(write_rows(tmp_path / "rows.jsonl", TEXTS))
    with pytest.raises(AdapterError, match=r"is for AutoModel; rows with labels measure adapters for AutoModelForSeq"):
        measure([tmp_path / "x"], [file])
