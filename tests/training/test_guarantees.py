"""What holds when a run is killed, interrupted, out of space, or meets a NaN; and that seeds reproduce."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import datetime
from functools import partial

import pytest
import torch
from processes import run_python
from tiny_training import CHAT, SHORT, train_until, write_base, write_rows
from training.killed_run import killed_run

from minilora_hub.errors import TrainingError, TrainingInterrupted
from minilora_hub.training import adapter_checkpoints
from minilora_hub.training import run as run_module
from minilora_hub.training import trainer as trainer_module
from minilora_hub.training.adapter_checkpoints import last_checkpoint
from minilora_hub.training.run import train

WEIGHTS = "adapter_model.safetensors"
RUN = SHORT | {"method": "mixlora", "num_experts": 4, "max_steps": 9, "save_every": 3, "lora_dropout": 0.1}
PLACES = ["weights"]
PLACES += [
    pytest.param(place, marks=pytest.mark.slow) for place in ("step:1", "step:5", "step:8", "optimizer", "result")
]
SAVED = {"step:1": None, "step:8": "checkpoint-6", "result": "checkpoint-9"}


def digest(out):
    """What stands for the weights' bytes: pytest would look for the difference of two long ones for minutes."""
    return hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def train_apart(forked):
    """Train in a process of its own, as the runs that are killed are: this one has run other tests before."""

    def run(out, **said):
        assert forked.run(partial(train, out, **said)) == 0, forked.said.read_text()[-2000:]

    return run


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory):
    """The weights of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, base=base, data=data, **RUN)
    return digest(out)


@pytest.fixture(scope="module")
def whole_apart(base, data, tmp_path_factory):
    """The same, in a process that is not forked: another order of sets and other addresses than in those that are."""
    out = tmp_path_factory.mktemp("whole-apart") / "run"
    said = RUN | {"base": base, "data": data}
    done = run_python(f"from minilora_hub.training.run import train; train({str(out)!r}, **{said!r})")
    assert done.returncode == 0, done.stderr[-2000:]
    return digest(out)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_resumes_to_the_same_bytes(place, base, data, whole_apart, train_apart, forked, tmp_path):
    """SIGKILL at a step, in the middle of a checkpoint, or before the result is complete."""
    out = tmp_path / "run"
    status = forked.run(killed_run, place, str(out), RUN | {"base": base, "data": data})
    assert status == -signal.SIGKILL, forked.said.read_text()[-2000:]
    saved = last_checkpoint(out)
    assert (saved.name if saved else None) == SAVED.get(place, "checkpoint-3")
    assert (out / WEIGHTS).exists() == (place == "result")
    train_apart(out, resume=True)
    assert len((out / "loss.csv").read_text().splitlines()) == 10
    assert digest(out) == whole_apart
    assert not list((out / "checkpoints").glob(".saving*"))
    with pytest.raises(TrainingError, match="is finished"):
        train(out, resume=True)


def test_two_runs_write_the_same_bytes_and_another_seed_does_not(base, data, whole, tmp_path):
    train(tmp_path / "again", base=base, data=data, **RUN)
    assert digest(tmp_path / "again") == whole
    train(tmp_path / "other", base=base, data=data, **RUN, seed=1)
    assert digest(tmp_path / "other") != whole


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"batching": "length-grouped"}, {"method": "adalora"}], ids=["grouped", "adalora"])
def test_other_orders_and_states_resume_alike(changed, base, data, tmp_path, monkeypatch):
    """A length-grouped order that starts a second epoch; AdaLoRA's scores and ranks."""
    said = RUN | {"base": base, "data": data} | changed
    if said["method"] == "adalora":
        said = {name: value for name, value in said.items() if name not in ("r", "num_experts")}
        said |= {"init_r": 6, "target_r": 3}
    train(tmp_path / "whole", **said)

    train_until(8, monkeypatch, tmp_path / "cut", **said)
    train(tmp_path / "cut", resume=True)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_a_run_is_resumed_on_another_day(data, tmp_path, monkeypatch):
    """The template writes the date: a resumed run trains on that of its beginning, to the same bytes."""
    dated = "<|user|>{{ strftime_now('%d %b %Y') }}<|end|>" + CHAT

    class Day(datetime):
        today = 1

        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 3, cls.today, 23, 59, 59, 5)

    monkeypatch.setattr(run_module, "datetime", Day)
    base = write_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(dated)
    said = {"base": str(base), "data": data, **RUN, "max_steps": 4, "save_every": 2, "record": False}
    train(tmp_path / "whole", **said)
    save = trainer_module.AdapterTrainer._save_checkpoint

    def stop(self, *args):
        save(self, *args)
        raise RuntimeError("stopped here")

    monkeypatch.setattr(trainer_module.AdapterTrainer, "_save_checkpoint", stop)
    with pytest.raises(RuntimeError, match="stopped here"):
        train(tmp_path / "cut", **said)
    monkeypatch.setattr(trainer_module.AdapterTrainer, "_save_checkpoint", save)
    Day.today = 2
    train(tmp_path / "cut", resume=True, record=False)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["begun"] == "2026-03-01T23:59:59"
    state = json.loads((tmp_path / "cut" / "run.json").read_text()) | {
        "finished": False,
        "begun": "2026-03-02T00:00:00",
    }
    (tmp_path / "cut" / "run.json").write_text(json.dumps(state))
    with pytest.raises(TrainingError, match="the data has changed since the run began"):
        train(tmp_path / "cut", resume=True)


def test_resuming_refuses_other_data_and_other_settings(base, data, tmp_path):
    out, begin = tmp_path / "run", {"base": base, "data": data, "resume": True}
    with pytest.raises(TrainingError, match=r"holds no training.yaml"):
        train(out, resume=True)
    out.mkdir()
    (out / "README.md").write_text("something else")
    with pytest.raises(TrainingError, match=r"must be empty or new"):
        train(out, **RUN, **begin)
    assert [file.name for file in out.iterdir()] == ["README.md"]
    (out / "README.md").unlink()
    train(tmp_path / "first", base=base, data=data, **RUN | {"max_steps": 1})
    settings = (tmp_path / "first" / "training.yaml").read_text()
    (out / "training.yaml").write_text(settings)
    (out / "run.json").write_text('{"data_sha256": "0"}')
    with pytest.raises(TrainingError, match="the data has changed since the run began"):
        train(out, resume=True)
    with pytest.raises(TrainingError, match=r"began with learning_rate=0.01, now it is 0.5"):
        train(out, resume=True, learning_rate=0.5)
    with pytest.raises(TrainingError, match="it holds a run: pass --resume"):
        train(out, base=base, data=data, **RUN)


def test_a_signal_saves_and_stops_and_the_rest_follows(base, data, whole, tmp_path, monkeypatch):
    compute = trainer_module.AdapterTrainer.compute_loss

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 4:
            signal.raise_signal(signal.SIGINT)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.AdapterTrainer, "compute_loss", interrupted)
    out = tmp_path / "run"
    with pytest.raises(TrainingInterrupted, match="stopped after step 5 of 9, which is saved") as raised:
        train(out, base=base, data=data, **RUN)
    monkeypatch.undo()
    assert raised.value.exit_code == 130
    train(out, resume=True)
    assert digest(out) == whole


@pytest.mark.slow
def test_ctrl_c_saves_and_stops_and_the_rest_follows(base, data, train_apart, tmp_path):
    said = {**RUN, "max_steps": 150, "save_every": 150}
    train_apart(tmp_path / "whole", base=base, data=data, **said)
    sets = [part for name, value in said.items() if name != "method" for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "minilora_hub.cli", "train", "--out", str(tmp_path / "cut")]
    arguments = ["--method", "mixlora", "--base", base, "--data", data, *sets]
    told = ""
    with subprocess.Popen(command + arguments, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            told += line
            if line.startswith("step 14/"):
                process.send_signal(signal.SIGINT)
                break
        told += process.stderr.read()
    assert process.returncode == 130, told
    saved = last_checkpoint(tmp_path / "cut")
    step = int(saved.name.partition("-")[2])
    assert 14 <= step < 150
    assert f"stopped after step {step} of 150, which is saved" in told
    assert "Traceback" not in told
    train_apart(tmp_path / "cut", resume=True)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")


def test_a_full_disk_leaves_the_checkpoint_before(base, data, whole, tmp_path, monkeypatch):
    """No file may grow beyond a limit from the second checkpoint on, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, calls = trainer_module.AdapterTrainer._save_checkpoint, []

    def limited(self, *args):
        calls.append(self.state.global_step)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        save(self, *args)

    monkeypatch.setattr(trainer_module.AdapterTrainer, "_save_checkpoint", limited)
    out = tmp_path / "run"
    try:
        advice = rf"checkpoint-3 is complete: .* minilora train --resume --out {out} goes on"
        with pytest.raises(TrainingError, match=rf"checkpoint of step 6 could not be written to '{out}.*{advice}"):
            train(out, base=base, data=data, **RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.undo()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-3"]
    train(out, resume=True)
    assert digest(out) == whole


def test_a_disk_that_is_full_at_the_end(base, data, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("minilora_hub.training.outputs.write_result", full)
        with pytest.raises(TrainingError, match=rf"out='{out}': .*No space left.*checkpoint-9 .*--out {out} goes on"):
            train(out, base=base, data=data, **RUN)
    train(out, resume=True)
    assert digest(out) == whole


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_nan_stops_with_step_rows_and_advice_before_weights_change(what, base, data, tmp_path, monkeypatch):
    compute = trainer_module.AdapterTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 4:
            factor = float("nan") if what == "loss" else 1.0
            inputs = inputs | {"labels": inputs["labels"]}
            router = next(p for name, p in model.named_parameters() if name.endswith("router"))
            if what == "loss":
                router.data[0, 0] = factor
            else:
                router.register_hook(lambda gradient: gradient * float("inf"))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer_module.AdapterTrainer, "compute_loss", poisoned)
    out = tmp_path / "run"
    with pytest.raises(TrainingError) as raised:
        train(out, base=base, data=data, **RUN)
    message = str(raised.value)
    assert f"the {what} became nan in step 5 on rows.jsonl:" in message
    assert message.count("rows.jsonl:") == 4
    assert "checkpoint-3 is complete" in message
    assert "--learning-rate" in message
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-3"]
    tensors = adapter_checkpoints.read_adapter(out / "checkpoints" / "checkpoint-3" / adapter_checkpoints.WEIGHTS)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_the_best_weights_are_kept_and_training_stops_early(base, tmp_path):
    """Held-out rows that say something else get worse while the others are learned by heart."""
    learned = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "yes"}] * 8)
    other = write_rows(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "no!"}] * 4)
    said = SHORT | {"method": "dora", "base": base, "data": str(learned), "validation_data": str(other)}
    said |= {"max_steps": 200, "save_every": 3, "early_stopping": 2, "schedule": "constant", "warmup": 0.0}
    started = time.perf_counter()
    result = train(tmp_path / "run", **said)
    assert result.steps < 100, time.perf_counter() - started
    rows = [line.split(",") for line in (tmp_path / "run" / "loss.csv").read_text().splitlines()[1:]]
    validated = {int(row[0]): float(row[2]) for row in rows if row[2]}
    assert result.best_step == min(validated, key=validated.get)
    assert result.best_step < max(validated)
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{result.best_step}" / adapter_checkpoints.WEIGHTS)
    saved = load_file(tmp_path / "run" / WEIGHTS)
    for name, tensor in kept.items():
        ours = name.removeprefix("base.model.").replace(".update.", ".")
        assert torch.equal(saved[ours], tensor)
