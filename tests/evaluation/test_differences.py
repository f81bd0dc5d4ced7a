"""Items on which two models differ, from a file as `minilora eval --out` writes it."""

from __future__ import annotations

import json
from math import comb

import pytest

from minilora_hub import cli
from minilora_hub.errors import AdapterError
from minilora_hub.evaluation.differences import compare_measured, llm_comparator, read_measured

RIGHT = {
    "base": {"dates": "000000", "numbers": "01"},
    "./dora": {"dates": "110110", "numbers": "11"},
    "./mix": {"dates": "101010", "numbers": "01"},
}
"""Whether each model is right, item by item."""


@pytest.fixture(scope="module")
def content():
    items = {
        task: [
            {
                "prompt": f"{task} {at}?",
                "reference": f"<{task} {at}>",
                "difficulty": 1 + at % 3,
                "entity": "",
                "labels": {},
            }
            for at in range(len(RIGHT["base"][task]))
        ]
        for task in ("dates", "numbers")
    }
    models = [
        {
            "name": name,
            "method": None if name == "base" else name[2:],
            "router": [{"task": "Dates", "load": [[0.5, 0.5], [0.7, 0.3]]}] if name == "./mix" else [],
            "answers": {
                task: [{"text": f"{name} {task} {at}", "exact": float(one)} for at, one in enumerate(right)]
                for task, right in tasks.items()
            },
        }
        for name, tasks in RIGHT.items()
    ]
    return {"items": items, "models": models}


@pytest.fixture(scope="module")
def file(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("measured") / "measured.json"
    path.write_text(json.dumps(content))
    return path


def test_items_are_counted_by_who_passes_them(file):
    found = compare_measured(read_measured(file))
    assert found.counts == {"both": 3, "./dora": 3, "./mix": 1, "neither": 1}
    assert [item.prompt for item in found.only("./dora")] == ["dates 1?", "dates 3?", "numbers 0?"]
    (item,) = found.only("./mix")
    assert item.answers == {name: f"{name} dates 2" for name in RIGHT}
    assert item.right == {"base": False, "./dora": False, "./mix": True}
    # Of four items that only one passes, three or more fall to one of two fair coins in 2 (4 + 1) of 16 cases.
    assert found.p_value == pytest.approx(2 * (comb(4, 3) + comb(4, 4)) / 2**4)
    assert found.routing == {"./mix": {"Dates": [pytest.approx(0.6), pytest.approx(0.4)]}}


def test_only_a_task_and_a_difficulty_and_against_the_base(content):
    found = compare_measured(content, second="base", tasks=["dates"], difficulty=1)
    assert [item.prompt for item in found.items] == ["dates 0?", "dates 3?"]
    assert found.counts == {"both": 0, "./dora": 2, "base": 0, "neither": 0}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"first": "x"}, "first='x': must be one of base, ./dora, ./mix"),
        ({"first": "./mix", "second": "./mix"}, "must be another model"),
        ({"tasks": ["poems"]}, "task='poems': must be one of dates, numbers"),
        ({"tasks": ["numbers"], "difficulty": 3}, "there are no such items"),
    ],
)
def test_what_is_not_there_is_named(asked, message, content):
    with pytest.raises(ValueError, match=message):
        compare_measured(content, **asked)


def test_a_file_without_answers(tmp_path):
    (tmp_path / "results.json").write_text('{"evaluation": []}')
    with pytest.raises(AdapterError, match=r"must be written by minilora eval --out"):
        read_measured(tmp_path / "results.json")


def test_the_json_of_llm_comparator(content):
    """The fields that its README names; a score above 0 says that A is better."""
    told = llm_comparator(compare_measured(content, tasks=["dates"]))
    assert [model["name"] for model in told["models"]] == ["./dora", "./mix"]
    assert [one["score"] for one in told["examples"]] == [0, 1, -1, 1, 0, 0]
    assert told["examples"][1]["output_text_a"] == "./dora dates 1"
    assert told["examples"][1]["tags"] == ["dates"]
    assert told["examples"][1]["individual_rater_scores"] == []
    schema = {field["name"] for field in told["metadata"]["custom_fields_schema"]}
    assert all(one["custom_fields"].keys() == schema for one in told["examples"])


def test_from_the_shell_and_in_a_notebook(file, tmp_path, capsys):
    out = tmp_path / "comparator.json"
    with pytest.raises(SystemExit) as exit_:
        cli.main(["diff", str(file), "--llm-comparator", str(out), "--limit", "1"])
    assert exit_.value.code == 0
    told = capsys.readouterr().out
    assert "8 items: both right 3, only ./dora 3, only ./mix 1, neither 1" in told
    assert "chance alone makes such a difference, or a larger, with probability 0.62" in told  # 10 of 16
    assert "experts of ./mix in 'Dates': A 60%, B 40%" in told
    assert "only ./dora is right, the first 1 of 3:" in told
    assert "✗ ./mix: ./mix dates 1" in told
    assert "dates 3?" not in told
    assert len(json.loads(out.read_text())["examples"]) == 8
    shown = compare_measured(read_measured(file))._repr_html_()
    assert shown.count("<tr>") == 1 + 4
    assert "&lt;dates 1&gt;" in shown
    assert "<dates 1>" not in shown
