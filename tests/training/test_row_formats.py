"""Rows as other tools write them, and what each file format does to them."""

from __future__ import annotations

import json
import re

import pyarrow
import pytest
from pyarrow import parquet

from minilora_hub.errors import DataError
from minilora_hub.training.data import checked, read_rows
from minilora_hub.training.sources import BadRow

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def call(arguments) -> dict:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


def weighted(**mark) -> list[dict]:
    return [ASK, SAY | mark]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [ASK, SAY]),
        ({"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}, [ASK, SAY]),
        ({"conversations": [ASK, SAY], "system": "s", "id": "x", "source": None}, [SYSTEM, ASK, SAY]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a", "weight": 0},
                    {"from": "observation", "value": "o"},
                    {"from": "gpt", "value": "a"},
                ],
                "system": "unused",
            },
            [SYSTEM, ASK, SAY | {"weight": 0}, {"role": "tool", "content": "o"}, SAY],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, [ASK, SAY]),
        ({"instruction": "q", "output": "a", "text": "Below is an instruction …"}, [ASK, SAY]),
        ({"instruction": "q", "input": "i", "output": "a"}, [ASK | {"content": "q\n\ni"}, SAY]),
        (
            {"instruction": "q2", "input": None, "output": "a2", "system": "s", "history": [["q", "a"]]},
            [SYSTEM, ASK, SAY, ASK | {"content": "q2"}, SAY | {"content": "a2"}],
        ),
        # ms-swift's fields that change nothing.
        (
            {"messages": weighted(loss=True), "images": [], "label": None, "rejected_response": "", "channel": "x"},
            weighted(loss=True),
        ),
        ({"messages": [ASK, call('{"a": 1}')], "tools": ""}, [ASK, call('{"a": 1}')]),
    ],
)
def test_rows_of_other_tools_become_messages(row, messages):
    before = json.dumps(row)
    found = checked("here", row)
    assert (found.kind, found.fields) == ("messages", {"messages": messages})
    assert json.dumps(row) == before


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            "is a preference pair .* write the better answer as completion",
        ),
        ({"chosen": [ASK, SAY], "rejected": [ASK, SAY]}, "is a preference pair .* TRL's DPOTrainer"),
        ({"messages": [ASK, SAY], "rejected_response": "b"}, "is a preference pair .it has 'rejected_response'"),
        ({"prompt": "p", "completion": "c", "label": False}, "is a rated answer"),
        ({"messages": [ASK, SAY], "images": ["a.png"]}, "has images: needs --task image-text-to-text"),
        ({"messages": [ASK, SAY], "chat_template_kwargs": {"enable_thinking": False}}, "has chat_template_kwargs"),
        ({"conversations": "hi"}, "conversations must be a list of messages"),
        ({"conversations": []}, "messages must be a list of messages, got empty list"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{}"}]},
            "turn 2: from='fu",
        ),
        (
            {"conversations": [{"from": ["human"], "value": "q"}]},
            r"turn 1: from=\['human'\]: must be one of human, gpt",
        ),
        ({"conversations": [{"from": "human", "value": "q"}]}, "no turn of the assistant"),
        ({"instruction": "q", "output": " "}, "output is empty"),
        ({"instruction": 1, "output": "a"}, "instruction is a int, not a string"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "history must be a list of pairs"),
        ({"instruction": "q", "output": "a", "system": ["x"]}, "system is a list, not a string"),
        ({"messages": weighted(weight=0.5)}, "turn 2: weight=0.5: must be 0 .no loss. or 1"),
        ({"messages": weighted(weight=True)}, "turn 2: weight=True: must be 0"),
        ({"messages": weighted(weight="0")}, "turn 2: weight='0': must be 0"),
        ({"messages": weighted(loss="no")}, "turn 2: loss='no': must be true or false"),
        ({"messages": [ASK, call("{city}")]}, "turn 2: the arguments of a tool call are not JSON"),
        ({"messages": [ASK, call('"SF"')]}, "turn 2: the arguments of a tool call are a str, not an object"),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": "f()"}]},
            "turn 2: tool_calls must be a list of objects",
        ),
        ({"messages": [ASK, SAY], "tools": "get_weather(city)"}, "tools is not JSON"),
        ({"messages": [ASK, SAY], "tools": '{"name": "f"}'}, "tools must be a list of objects"),
        ({"prompt": "p", "completion": "cut \ud83d"}, r"contains a lone surrogate, \\ud83d"),
        ({"messages": [ASK, call({"k": ["\udc00"]})]}, r"contains a lone surrogate, \\udc00"),
        ({"messages": [ASK, SAY], "tools": [{"\ud800": 1}]}, r"contains a lone surrogate, \\ud800"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "turn 1: must have a role, .*; got 'bot'"),
    ],
)
def test_what_cannot_be_learned_from_is_said(row, reason):
    found = checked("here", row)
    assert isinstance(found, BadRow)
    assert re.search(reason, found.reason), found.reason


def test_nulls_that_arrow_adds_are_not_taught_and_those_of_json_stay(tmp_path):
    """The rows of a Parquet file have all the same fields, so one call has the others' arguments as nulls."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    rows = [
        {"messages": [ASK, call({"city": "SF"})], "tools": tools},
        {"messages": [ASK | {"name": "me"}, call({"day": 1, "where": {"lat": 2.5}}), SAY], "tools": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = [row.fields for row in read_rows((str(tmp_path / "d.parquet"),))]
    assert found == [rows[0], {"messages": rows[1]["messages"]}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": [ASK, call({"day": None})]}))
    (row,) = read_rows((str(tmp_path / "d.jsonl"),))
    assert row.fields["messages"][1] == call({"day": None})


def test_an_old_macs_csv_and_a_parquet_file_of_other_bytes_are_named(tmp_path):
    (tmp_path / "mac.csv").write_bytes(b"prompt,completion\rq,a\r")
    with pytest.raises(DataError, match=r"mac.csv:1: has lines that end with CR only"):
        list(read_rows((str(tmp_path / "mac.csv"),)))
    (tmp_path / "later.csv").write_bytes(b"prompt,completion\nq,a\nr,b\rs,c\n")
    with pytest.raises(DataError, match=r"later.csv:3: has lines that end with CR only"):
        list(read_rows((str(tmp_path / "later.csv"),)))
    bad = pyarrow.array([b"\xff"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"bad.parquet: is not a readable Parquet file"):
        list(read_rows((str(tmp_path / "bad.parquet"),)))


def test_sharegpt_in_a_cell_of_csv(tmp_path):
    cell = json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]).replace('"', '""')
    (tmp_path / "d.csv").write_text(f'conversations\n"{cell}"\n')
    (row,) = read_rows((str(tmp_path / "d.csv"),))
    assert row.fields == {"messages": [ASK, SAY]}
