"""Two processes over gloo: started by accelerate and torchrun, and forked in groups such as torchrun makes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import SHORT, preferring_long, write_votes
from training.forced_routing import forced_routing
from training.killed_run import split_run

from minilora_hub.training.adapter_checkpoints import last_checkpoint
from minilora_hub.training.run import train

# accelerate's own name for "several processes on this machine"; with --cpu it would start one (1.15).
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launched(launcher: list[str], *arguments: str) -> list[str]:
    return [sys.executable, *launcher, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def curve(out: Path) -> torch.Tensor:
    with (out / "loss.csv").open() as file:
        return torch.tensor([float(row["loss"]) for row in csv.DictReader(file)])


@pytest.mark.slow
def test_two_processes_reach_the_curve_of_one(base, rows, tmp_path):
    """Of an accumulated batch exactly, where a mixture is balanced over the same rows; of a whole one nearly."""
    said = SHORT | {"method": "mixlora", "num_experts": 4, "max_steps": 8, "save_every": 8, "learning_rate": 1e-3}
    sets = [part for name, value in said.items() if name != "method" for part in ("--set", f"{name}={value}")]
    flags = ["--method", "mixlora", "--base", base, "--data", rows, "--out", str(tmp_path / "two"), *sets]
    command = launched(ACCELERATE, "-m", "minilora_hub.cli", "train", *flags)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("8 steps in") == done.stderr.count("trainable") == 1  # one of them speaks
    train(tmp_path / "whole", base=base, data=rows, **said)
    train(tmp_path / "halves", base=base, data=rows, **said, micro_batch_size=2)
    torch.testing.assert_close(curve(tmp_path / "two"), curve(tmp_path / "halves"), rtol=0, atol=2e-5)
    torch.testing.assert_close(curve(tmp_path / "two"), curve(tmp_path / "whole"), rtol=0, atol=5e-3)
    two, halves = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "halves"))
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, halves[name], rtol=0, atol=2e-4)
    assert json.loads((tmp_path / "two" / "results.json").read_text())["training"]["steps"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "mixlora"])
def test_a_base_that_is_split_trains_as_a_whole_one(method, base, rows, forked, tmp_path):
    """DoRA is killed after half of its steps and resumed. The rows fill each step: the last of an epoch may differ."""
    said = SHORT | {
        "method": method,
        "base": base,
        "data": rows,
        "max_steps": 8,
        "save_every": 4,
        "learning_rate": 1e-3,
    }
    said |= {"num_experts": 4, "router_lr_ratio": 2.0} if method == "mixlora" else {"validation": 0.17}
    for part in ("first", "second") if method == "dora" else ("all",):
        status = forked.run_two(split_run, part, str(tmp_path / "split"), said | {"shard": True})
        assert status == (9 if part == "first" else 0), forked.said.read_text()[-3000:]
        assert (last_checkpoint(tmp_path / "split").name == "checkpoint-4") == (part == "first")
    whole = train(tmp_path / "halves", record=False, micro_batch_size=2, **said)
    torch.testing.assert_close(curve(tmp_path / "split"), curve(tmp_path / "halves"), rtol=0, atol=2e-5)
    split, halves = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("split", "halves"))
    assert split.keys() == halves.keys()
    for name, tensor in split.items():
        torch.testing.assert_close(tensor, halves[name], rtol=0, atol=2e-4)
    result = json.loads((tmp_path / "split" / "results.json").read_text())["training"]
    assert result["steps"] == 8
    held = int((tmp_path / "split.bytes").read_text())  # of the base, by one process
    assert held <= 0.51 * whole.plan.base_bytes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kept", "teacher and votes"])
def test_two_processes_with_objectives_reach_the_weights_of_one(kind, base, rows, forked, tmp_path):
    """Against one process that accumulates the same halves: every term of the log, and what is saved."""
    (tmp_path / "general.txt").write_text("The sky is blue and the grass is green. " * 20, encoding="utf-8")
    said = {"base": base, "data": rows, "max_steps": 4, "batch_size": 4, "save_every": 4, "learning_rate": 1e-3}
    first = {"method": "lora", "r": 2, "seed": 1, "record": False, **said}
    train(tmp_path / "first", **first | {"learning_rate": 1e-2})
    if kind == "kept":
        said |= {"method": "lora", "r": 3, "keep": [str(tmp_path / "first")]}
        said["objective"], terms = ["orthogonal:weight=0.5"], ["loss", "orthogonal"]
    else:
        anchor = f"anchor:data={tmp_path / 'general.txt'},length=16"
        votes = write_votes(tmp_path / "votes.jsonl", preferring_long(16))
        said |= {"method": "mixlora", "r": 2, "num_experts": 3, "data": None, "from_votes": votes}
        said["objective"] = [f"distill:teacher={tmp_path / 'first'},labels=0.5", anchor, "dpo:beta=0.5"]
        terms = ["loss", "distill", "anchor", "dpo"]
    status = forked.run_two(partial(train, tmp_path / "two", record=False, **said))
    assert status == 0, forked.said.read_text()[-3000:]
    train(tmp_path / "halves", record=False, micro_batch_size=2, **said)
    logs = []
    for name in ("two", "halves"):
        with (tmp_path / name / "loss.csv").open() as file:
            logs.append([[float(row[term]) for term in terms] for row in csv.DictReader(file)])
    torch.testing.assert_close(torch.tensor(logs[0]), torch.tensor(logs[1]), rtol=1e-4, atol=5e-5)
    two, halves = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "halves"))
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, halves[name], rtol=0, atol=2e-4)
    if kind == "kept":  # a rank of 2 that is kept, and 3
        assert {value.shape[0] for name, value in two.items() if "lora_A" in name} == {5}


@pytest.mark.slow
def test_experts_without_tokens_neither_hang_nor_skew_a_process(base, rows, forked, tmp_path):
    said = SHORT | {"method": "mixlora", "num_experts": 4, "base": base, "data": rows}
    status = forked.run_two(forced_routing, tmp_path / "out", said)
    assert status == 0, forked.said.read_text()[-3000:]
    first, second = (load_file(tmp_path / f"process{rank}.safetensors") for rank in (0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    learned = {name: value for name, value in first.items() if ".experts." in name and name.endswith("lora_B")}
    assert len(learned) == 6
    for name, value in learned.items():
        moved = value.flatten(1).abs().amax(dim=1) > 0  # B starts at zero
        assert moved.tolist() == [True, True, True, False], name


@pytest.mark.slow
def test_ctrl_c_stops_both_processes_after_the_same_step(base, rows, tmp_path):
    out = tmp_path / "out"
    flags = ["--method", "dora", "--base", base, "--data", rows, "--out", str(out), "--batch-size", "4", "--rank", "4"]
    command = launched(TORCHRUN, "-m", "minilora_hub.cli", "train", *flags, "--max-steps", "3000")
    told = ""
    with subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        for line in process.stderr:
            told += line
            if line.startswith("step 150/"):
                os.killpg(process.pid, signal.SIGINT)
                break
        started = time.monotonic()
        told += process.stderr.read()
    assert process.returncode != 0
    assert time.monotonic() - started < 60
    saved = last_checkpoint(out)
    assert f"stopped after step {saved.name.partition('-')[2]} of 3000, which is saved" in told
