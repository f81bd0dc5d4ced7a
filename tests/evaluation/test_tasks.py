"""The tasks' items: the same everywhere, split by entity, right, and as files that training takes."""

from __future__ import annotations

import calendar
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from datetime import date, timedelta

import pytest

from minilora_hub.errors import MiniLoraError, MissingExtraError
from minilora_hub.evaluation.tasks import inflection
from minilora_hub.evaluation.tasks import items as items_module
from minilora_hub.evaluation.tasks.dates import STEPS
from minilora_hub.evaluation.tasks.items import SPLITS
from minilora_hub.evaluation.tasks.registry import TASKS, write
from minilora_hub.training.data import Row, read_rows

# Of the test and held-out items. They change only on purpose: results of other items can't be compared.
HASHES = {
    "dates": "5b52fa327879233a",
    "numbers": "7f335060832c92b7",
    "inflection": "1948e7dcf95bdac6",
    "records": "fb7564d98ce11227",
}


@pytest.mark.parametrize("name", TASKS)
def test_the_items_are_those_that_results_were_measured_on(name):
    made = [asdict(item) for split in ("test", "held_out") for item in TASKS[name].items(split)]
    text = json.dumps(made, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == HASHES[name]


@pytest.mark.slow
def test_another_process_with_another_hash_seed_makes_the_same_items():
    code = (
        "from minilora_hub.evaluation.tasks.registry import TASKS; print([t.items('test', 40) for t in TASKS.values()])"
    )
    command = [sys.executable, "-c", code]
    outputs = {
        subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{[task.items('test', 40) for task in TASKS.values()]}\n"}


@pytest.mark.parametrize("name", TASKS)
def test_there_are_enough_items_of_each_difficulty_and_none_twice(name):
    task = TASKS[name]
    assert len(task.items("test")) >= 500
    assert len(task.items("validation")) >= 100
    assert len(task.items("train")) >= 1500
    assert len(task.items("held_out")) >= 100
    assert min(Counter(item.difficulty for item in task.items("test")).values()) >= 50
    for split in SPLITS:
        made = task.items(split)
        assert len({item.prompt for item in made}) == len(made)
        assert {(item.task, item.split) for item in made} == {(name, split)}
        assert task.items(split, 20) == made[:20]


def occurs(entity: str, text: str) -> bool:
    return (
        re.search(rf"(?<![\w.,-]){re.escape(entity)}(?:st|nd|rd|th)?(?![\w-]|[.,]\d)", text, re.IGNORECASE) is not None
    )


@pytest.mark.slow
def test_no_test_entity_appears_in_any_training_prompt_or_completion():
    texts = "\n".join(
        f"{i.prompt}\n{i.completion}" for t in TASKS.values() for s in ("train", "validation") for i in t.items(s)
    )
    words = {word.lower() for word in re.findall(r"[\w.,-]*\w", texts)}
    for task in TASKS.values():
        for item in (*task.items("test"), *task.items("held_out")):
            present = (item.entity.lower() in words) if " " not in item.entity else occurs(item.entity, texts)
            assert not present, item


def test_the_check_above_finds_an_entity_that_leaked():
    assert occurs("1234", "Write this in words: 1234\n")
    assert occurs("1234", "1234th")
    assert not occurs("1234", "1234.56 and 51234 and 1234-05-06")


def test_names_of_people_in_test_records_never_occur_in_training_records():
    trained = {word for i in TASKS["records"].items("train") for word in re.findall(r"\w+", i.completion)}
    for item in TASKS["records"].items("test"):
        first, last = item.entity.split(" ", 1)
        assert first not in trained
        assert last not in trained


def test_held_out_formats_occur_nowhere_else():
    for task in TASKS.values():
        held_out = {item.labels["format"] for item in task.items("held_out")}
        assert held_out
        for split in ("train", "validation", "test"):
            assert held_out.isdisjoint(item.labels["format"] for item in task.items(split))


def test_dates_beside_another_date_are_right():
    checked = 0
    for item in TASKS["dates"].items("test"):
        found = re.fullmatch(
            r"Write as YYYY-MM-DD: (.+ (?:after|before)) (?:\w+, (\d+) (\w+)|(\w+) (\d+),) (\d{4})", item.prompt
        )
        if found is None:
            continue
        phrase, day_gb, month_gb, month_us, day_us, year = found.groups()
        named = date(int(year), list(calendar.month_name).index(month_gb or month_us), int(day_gb or day_us))
        assert item.completion == (named + timedelta(days=STEPS[phrase])).isoformat()
        checked += 1
    assert checked > 30


def test_records_say_what_the_sentence_says():
    for item in TASKS["records"].items("test"):
        record = json.loads(item.completion)
        sentence = item.prompt.partition(": ")[2]
        for person in record if isinstance(record, list) else [record]:
            flat = person.pop("home", {}) | person
            for value in flat.values():
                assert value is None or str(value) in sentence
    missing = [i for i in TASKS["records"].items("test") if i.labels["format"] == "missing"]
    assert missing
    assert all("null" in item.completion for item in missing)


def test_how_difficult_a_form_is():
    assert inflection._difficulty("cat", "NNS", "cats") == 1
    assert inflection._difficulty("baby", "NNS", "babies") == 2
    assert inflection._difficulty("stop", "VBG", "stopping") == 2
    assert inflection._difficulty("go", "VBD", "went") == 3


def test_compounds_of_an_irregular_verb_share_its_split():
    assert len({inflection._split(word) for word in ("take", "overtake", "undertake", "partake")}) == 1


@pytest.mark.parametrize(("split", "count", "message"), [("tests", None, "split='tests'"), ("test", 0, "count=0")])
def test_wrong_splits_and_counts_are_named(split, count, message):
    with pytest.raises(ValueError, match=message):
        TASKS["dates"].items(split, count)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "num2words", None)
    with pytest.raises(MissingExtraError, match=r"num2words is not installed.*minilora_hub\[eval\]"):
        items_module.library("num2words")


# ---- the files ----


def test_files_of_each_task_and_of_the_mix_that_training_reads(tmp_path):
    counts = write(tmp_path, (), ("train", "validation"), 30)
    assert counts["mix.train.jsonl"] == 120
    assert len(counts) == 10
    for name, count in counts.items():
        rows = list(read_rows((str(tmp_path / name),)))
        assert [type(row) for row in rows] == [Row] * count
        assert {row.kind for row in rows} == {"prompt and completion"}
    rows = [json.loads(line) for line in (tmp_path / "mix.train.jsonl").read_text().splitlines()]
    assert Counter(row["task"] for row in rows[:8]) == dict.fromkeys(TASKS, 2)


def test_one_task_has_no_mix(tmp_path):
    assert write(tmp_path, ("dates",), ("test",)) == {"dates.test.jsonl": len(TASKS["dates"].items("test"))}


@pytest.mark.parametrize(
    ("tasks", "splits", "count", "message"),
    [
        (("date",), ("train",), None, "task 'date': must be one of dates, numbers"),
        ((), ("dev",), None, "split 'dev': must be one of train"),
        ((), ("validation",), 5000, "count=5000: must be between 1 and"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(tmp_path, tasks, splits, count, message):
    with pytest.raises(MiniLoraError, match=message):
        write(tmp_path / "new", tasks, splits, count)
    assert not (tmp_path / "new").exists()


def test_the_command(tmp_path):
    command = [
        sys.executable,
        "-m",
        "minilora_hub.cli",
        "tasks",
        "--out",
        str(tmp_path),
        "--task",
        "dates",
        "--count",
        "5",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["rows"] == {"dates.train.jsonl": 5, "dates.validation.jsonl": 5}
