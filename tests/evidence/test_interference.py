"""The plan of the runs on tasks that pull apart, their rows, and the table."""

from __future__ import annotations

import json
from collections import Counter

from evidence import interference
from evidence.conflicts import CONFLICTS
from evidence.interference import ALL, Sizes, file_of, plan
from evidence.plan import METHODS


def test_a_task_has_as_many_rows_alone_as_together(tmp_path):
    """The rows together are those of each task in turn, so the first 6 n rows hold the first n of each."""
    interference.write_rows(tmp_path)
    alone = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in CONFLICTS}
    together = (tmp_path / f"{ALL}.jsonl").read_text().splitlines()
    assert Counter(together) == Counter(line for lines in alone.values() for line in lines)
    assert together[: len(CONFLICTS)] == [lines[0] for lines in alone.values()]
    sizes = Sizes(240, 8, 200)
    assert sum(sizes.steps_of(name) for name in CONFLICTS) == sizes.steps_of(ALL)


def test_every_method_seed_and_task_is_planned_once():
    runs = plan(METHODS, (0, 1))
    assert len(runs) == len(set(runs)) == len(METHODS) * 2 * (1 + len(CONFLICTS))
    assert [method for method, data, seed in runs if data == ALL and seed == 0][:2] == ["lora", "mixlora"]


def test_interference_is_what_is_lost_together(tmp_path, monkeypatch):
    monkeypatch.setattr(interference, "FOLDER", tmp_path)
    assert interference.report() == "None of these runs has been made yet."
    sizes = Sizes(240, 8, 4)
    right = {ALL: dict.fromkeys(CONFLICTS, "1100"), **{name: {name: "1110"} for name in CONFLICTS}}
    for method in ("lora", "mixlora"):
        for data, exact in right.items():
            if (method, data) != ("mixlora", "players"):
                result = {"method": method, "data": data, "seed": 1, **vars(sizes), "exact": exact}
                file_of(method, data, 1, sizes).write_text(json.dumps(result))
    lora, mixlora = (line.split(" | ") for line in interference.report().splitlines()[2:])
    assert lora[0] == "| LoRA, seed 1, 240 steps of 8 rows"
    assert lora[1:] == ["75 → 50"] * len(CONFLICTS) + ["+25.0 |"]
    assert mixlora[-2:] == ["? → 50", " |"]  # without a run no mean is given
