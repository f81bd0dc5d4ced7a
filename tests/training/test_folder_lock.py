"""One run at a time writes into a folder, and a run that was killed holds none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from minilora_hub.errors import TrainingError
from minilora_hub.training.run import train
from minilora_hub.training.run_folder import folder_lock
from minilora_hub.training.sweep import sweep

HOLD = (
    "import sys, time; from pathlib import Path; from minilora_hub.training.run_folder import folder_lock\n"
    "with folder_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


def test_a_second_run_is_refused_at_once_and_a_killed_one_holds_nothing(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            message = rf"out='{out}': another run writes into it \(process {process.pid}\): wait for its end"
            said = {"method": "dora", "base": "no/such-base", "data": "rows.jsonl"}
            for start in (
                lambda: train(out, **said),
                lambda: train(out, resume=True, **said),
                lambda: sweep(out, {"r": [2, 4]}, **said),
            ):
                with pytest.raises(TrainingError, match=message):
                    start()
            assert [path.name for path in out.iterdir()] == [".lock"]
        finally:
            process.kill()
    with folder_lock(out):  # the file is still there, and nobody holds it
        assert (out / ".lock").read_text() != str(process.pid)
    assert list(out.iterdir()) == []


def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(TrainingError, match="no rows"), folder_lock(out):
        raise TrainingError("no rows")
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with folder_lock(out):
        pass
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    with pytest.raises(TrainingError, match="is a file"), folder_lock(out / "mine.txt"):
        pass


def test_a_dry_run_needs_no_lock_and_makes_no_folder(base, rows, tmp_path):
    out = tmp_path / "out"
    train(out, method="dora", base=base, data=rows, dry_run=True)
    assert not out.exists()
    with folder_lock(out):
        train(out, method="dora", base=base, data=rows, dry_run=True)
