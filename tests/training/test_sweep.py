"""Sweeps: every combination, a library's search, a budget, going on after a kill, and one table with the best."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import signal
from dataclasses import replace

import pytest
from tiny_training import SHORT
from training.killed_run import killed_sweep

from minilora_hub.cli import main
from minilora_hub.errors import TrainingError
from minilora_hub.training import sweep as module
from minilora_hub.training.sweep import sweep
from minilora_hub.training.sweep_trials import Range, TrialStore, parse_values

FIXED = {name: value for name, value in SHORT.items() if name not in ("r", "learning_rate")} | {"validation": 0.25}


@pytest.mark.slow
def test_a_grid_on_the_command_line(base, rows, tmp_path, capsys):
    out = tmp_path / "sweep"
    sets = [part for name, value in FIXED.items() for part in ("--set", f"{name}={value}")]
    vary = ["--vary", "learning_rate=1e-4,2e-2", "--vary", "r=2,4"]
    command = ["sweep", "--method", "dora", "--base", base, "--data", rows, "--out", str(out), *sets, *vary]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    with (out / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {(row["learning_rate"], row["r"]) for row in table} == {
        ("0.0001", "2"),
        ("0.0001", "4"),
        ("0.02", "2"),
        ("0.02", "4"),
    }
    losses = [float(row["validation_loss"]) for row in table]
    assert losses == sorted(losses)
    assert table[0]["learning_rate"] == "0.02"  # a rate of 1e-4 learns nothing in four steps
    assert f"best: {out / table[0]['folder']}" in printed
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    best = json.loads((out / table[0]["folder"] / "results.json").read_text())
    assert best["training"]["hyperparameters"]["learning rate"] == 0.02
    rows_in_loss = (out / table[0]["folder"] / "loss.csv").read_text().splitlines()[1:]
    validated = [float(line.split(",")[2]) for line in rows_in_loss if line.split(",")[2]]
    assert min(validated) == losses[0]


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_repeats_nothing(base, rows, tmp_path, monkeypatch):
    said = FIXED | {"method": "dora", "base": base, "data": rows}
    vary = {"learning_rate": [1e-3, 1e-2, 2e-2]}
    whole = sweep(tmp_path / "whole", vary, **said)
    train, calls = module.train, []

    def cut(folder, **settings):
        calls.append(folder.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(folder, **settings)

    monkeypatch.setattr(module, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "cut", vary, **said)
    result = sweep(tmp_path / "cut", vary, **said)
    assert len(calls) == 4
    assert calls[1] == calls[2]  # the trial that was stopped
    assert {*calls} == {"learning_rate=0.001", "learning_rate=0.01", "learning_rate=0.02"}
    assert [(t.values, t.validation_loss) for t in result.trials] == [
        (t.values, t.validation_loss) for t in whole.trials
    ]
    with pytest.raises(TrainingError, match=r"holds a sweep with other settings \(vary\)"):
        sweep(tmp_path / "cut", {"learning_rate": [1.0]}, **said)


@pytest.mark.slow
def test_a_killed_sweep_goes_on(base, rows, forked, tmp_path):
    """SIGKILL in the middle of a trial: the others are kept, and this one is made."""
    said = FIXED | {"method": "dora", "base": base, "data": rows}
    vary = {"learning_rate": [1e-3, 1e-2, 2e-2]}
    status = forked.run(killed_sweep, tmp_path / "cut", vary, said)
    assert status == -signal.SIGKILL, forked.said.read_text()[-2000:]
    result, whole = (sweep(tmp_path / name, vary, **said) for name in ("cut", "whole"))
    assert [trial.values for trial in result.trials] == [trial.values for trial in whole.trials]
    losses = [[trial.validation_loss for trial in trials] for trials in (result.trials, whole.trials)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("changed", ["file/{rows}", "file/{config}", "base/{base}", "code/remote_code/routing.py"])
def test_a_sweep_is_not_gone_on_with_where_something_has_changed(changed, base, rows, tmp_path, monkeypatch):
    """Before the first trial ends: nothing needs to be trained for it."""
    base, config = shutil.copytree(base, tmp_path / "base"), tmp_path / "sweep.yaml"
    config.write_text("weight_decay: 0.1\n")
    said = FIXED | {"method": "dora", "base": str(base), "data": rows, "config": str(config)}

    def stopped(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path / "sweep", {"r": [2, 3]}, **said)
    changed = changed.format(rows=rows, config=config, base=base)
    if changed.startswith("file/"):
        with open(changed.removeprefix("file/"), "a") as file:
            file.write("\n")
    elif changed.startswith("base/"):
        (base / "config.json").write_text((base / "config.json").read_text() + " ")
    else:
        monkeypatch.setitem(module.CODE_AND_LIBRARIES, changed, "another")
    with pytest.raises(TrainingError, match=rf"because these have changed since: {re.escape(changed)}; pass another"):
        sweep(tmp_path / "sweep", {"r": [2, 3]}, **said)


def test_a_trial_that_fails_is_told_and_the_others_count(base, rows, tmp_path):
    said = FIXED | {"method": "dora", "base": base, "data": rows}
    result = sweep(tmp_path / "sweep", {"r": [4, 0]}, **said)
    assert [trial.state for trial in result.trials] == ["finished", "failed"]
    assert result.best.values == {"r": 4}
    assert "r=0 failed: r=0: the rank must be an integer of at least 1" in result.notes[0]


def test_a_sweep_whose_trials_all_fail_has_failed(monkeypatch, tmp_path):
    failed = (module.Trial({"r": 0}, "r=0", "failed", reason="r=0: …"),)
    monkeypatch.setattr(module, "sweep", lambda out, vary, **said: module.SweepResult(out, failed, left=0))
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "--method", "dora", "--base", "b", "--data", "d", "--vary", "r=0", "--out", str(tmp_path)])
    assert ended.value.code == 1


@pytest.mark.slow
def test_a_search_stays_in_its_ranges_and_can_go_on(base, rows, tmp_path):
    said = FIXED | {"method": "dora", "base": base, "data": rows, "max_steps": 1}
    vary = {"learning_rate": Range(1e-4, 1e-1), "r": Range(2, 8), "use_rslora": [True, False]}
    first = sweep(tmp_path / "sweep", vary, search="tpe", trials=2, **said)
    result = sweep(tmp_path / "sweep", vary, search="tpe", trials=4, **said)
    assert len(result.trials) == 4
    assert {trial.folder for trial in first.trials} <= {trial.folder for trial in result.trials}
    for trial in result.trials:
        assert 1e-4 <= trial.values["learning_rate"] <= 1e-1
        assert trial.values["r"] in range(2, 9)
    assert len({trial.values["learning_rate"] for trial in result.trials}) == 4


def test_every_combination_has_a_folder_of_its_own(tmp_path):
    """However alike they are, or long."""
    long = "a" * 200
    vary = {"learning_rate": [1e-3, 1.00000001e-3], "data": ["a/b", "a_b", f"{long}1", f"{long}2"]}
    store = TrialStore(tmp_path, vary, "grid", 0, {"inputs": {}, "search": "grid", "vary": {}, "settings": {}})
    trials = []
    while (trial := store.next()) is not None:
        store.end(replace(trial, state="finished", validation_loss=1.0))
        trials.append(trial)
    asked = [(trial.values["learning_rate"], trial.values["data"]) for trial in trials]
    assert sorted(asked) == sorted(itertools.product(*vary.values()))
    assert len({trial.folder for trial in trials}) == 8
    assert max(len(trial.folder) for trial in trials) == 150
    assert "learning_rate=0.001,data=a_b" in {trial.folder for trial in trials}  # what can be a name is one


def test_a_budget_ends_it(base, rows, tmp_path):
    said = FIXED | {"method": "dora", "base": base, "data": rows}
    result = sweep(tmp_path / "sweep", {"r": [2, 3, 4, 5]}, minutes=1e-6, **said)
    assert len(result.trials) == 1
    assert result.left == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning-rate=1e-4,1e-3", ("learning_rate", [1e-4, 1e-3])),
        ("r=4..32", ("r", Range(4, 32))),
        ("learning_rate=1e-5..1e-3", ("learning_rate", Range(1e-5, 1e-3))),
        ("batching=packed,shuffled", ("batching", ["packed", "shuffled"])),
    ],
)
def test_values_are_read(text, expected):
    assert parse_values(text) == expected


def test_values_that_are_equal_are_refused():
    with pytest.raises(TrainingError, match="--vary 'r=4,8,4': a value is given twice: leave one out"):
        parse_values("r=4,8,4")


@pytest.mark.parametrize("text", ["r", "r=", "=4", "r=8..4", "r=a..b", "r=4,8,"])
def test_values_that_cannot_be_read_are_refused(text):
    with pytest.raises(TrainingError, match="must be NAME=VALUE"):
        parse_values(text)
