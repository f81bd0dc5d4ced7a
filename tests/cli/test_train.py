"""`minilora train` as a user meets it: a plan, a result, one-line errors, exit codes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from hub.server import HubServer
from tiny_training import colour_rows, write_base, write_rows

from minilora_hub.cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture
def rows(tmp_path):
    return str(write_rows(tmp_path / "rows.jsonl"))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    return ended.value.code


def one_line(capsys) -> str:
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("minilora: ")]
    assert "Traceback" not in printed
    return line


def test_it_tells_the_plan_then_progress_then_what_comes_next(base, rows, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--rank", "4", "--max-steps", "5", "--lr", "1e-2", "--validation", "0.25", "--set", "num_experts=3"]
    assert run("--method", "mixlora", "--base", base, "--data", rows, "--out", str(out), *flags) == 0
    printed = capsys.readouterr()
    plan = [line.split()[0] for line in printed.err.splitlines()[:8]]
    assert plan == ["method", "trainable", "data", "tokens", "end", "steps", "memory", "time"]
    assert "an answer ends with <|end|>\n" in printed.err
    assert "18 rows, 6 held out" in printed.err
    shown = dict(re.findall(r"^step (\d)/5 .*validation (\S+)", printed.err, re.MULTILINE))
    with open(out / "loss.csv") as file:
        measured = {row["step"]: f"{float(row['validation_loss']):.4f}" for row in csv.DictReader(file)}
    assert shown == measured
    assert len(set(shown.values())) == 5
    assert f"{out}: 5 steps in" in printed.out
    assert "validation loss" in printed.out
    assert "next: minilora push" in printed.out
    results = json.loads((out / "results.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert (results["method"], config["num_experts"], config["r"], config["lora_alpha"]) == ("mixlora", 3, 4, 8)
    assert results["training"]["steps"] == 5
    assert [step for step, _ in results["training"]["loss"]] == [1, 2, 3, 4, 5]
    (source,) = results["training"]["data"]
    assert (source["name"], source["items"]) == ("rows.jsonl", 18)
    said = sum(values.numel() for values in tensors(out).values())
    assert results["parameters"] == said


def tensors(out):
    from safetensors.torch import load_file

    return load_file(out / "adapter_model.safetensors")


def test_json_on_stdout_and_nothing_else(base, rows, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--method", "dora", "--base", base, "--data", rows, "--out", str(out), "--max-steps", "2", "--json") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["out"] == str(out)
    assert result["steps"] == result["plan"]["steps"] == 2
    assert "step" not in printed.err


def test_a_dry_run_writes_nothing(base, rows, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--method", "lora", "--base", base, "--data", rows, "--out", str(out), "--dry-run") == 0
    assert not out.exists()
    printed = capsys.readouterr()
    assert "Nothing was trained." in printed.out
    assert "24 rows" in printed.err
    assert run("--method", "lora", "--base", base, "--data", rows, "--out", "/proc/minilora", "--dry-run") == 1
    assert "out='/proc/minilora': cannot be written" in one_line(capsys)


def test_a_yaml_file_is_overridden_by_flags_and_saved_complete(base, rows, tmp_path, capsys):
    import yaml

    config = tmp_path / "my.yaml"
    config.write_text(
        f"method: dora\nbase: {base}\ndata: {rows}\nlearning_rate: 1e-3\nmax_steps: 2\nadapter:\n  r: 6\n"
    )
    assert run("--config", str(config), "--out", str(tmp_path / "a"), "--lr", "5e-3") == 0
    saved = yaml.safe_load((tmp_path / "a" / "training.yaml").read_text())
    assert (saved["learning_rate"], saved["max_steps"], saved["adapter"]["r"]) == (5e-3, 2, 6)
    assert run("--config", str(tmp_path / "a" / "training.yaml"), "--out", str(tmp_path / "b")) == 0
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "qlora"], "method='qlora': must be one of lora, dora"),
        (["--set", "num_expert=4"], "num_expert=4: neither a training setting nor a field of dora"),
        (["--set", "learnin_rate=1"], "did you mean 'learning_rate'?"),
        (["--set", "oops"], "--set 'oops': must be NAME=VALUE"),
        (["--set", "r=two"], "r='two': the rank must be an integer"),
        (["--lr", "-1"], "learning_rate=-1.0: must be above 0"),
        (["--batching", "sorted"], "batching='sorted': must be one of shuffled, length-grouped, packed"),
        (["--batch-size", "6", "--micro-batch-size", "4"], "micro_batch_size=4: must divide batch_size"),
        (["--early-stopping", "2"], "early_stopping=2: needs --validation"),
        (["--quantize", "nf3"], "quantize='nf3': must be one of nf4, int8"),
        (["--report-to", "nowhere"], "'nowhere' is unknown; known are trackio, tensorboard, wandb"),
        (["--optimizer", "adamw_torhc"], "optimizer='adamw_torhc': transformers has no such optimizer"),
        (["--optimizer", "paged_adamw_8bit"], "needs a CUDA device, and there is none: pass 'adamw_8bit'"),
        (["--optimizer", "galore_adamw"], "optimizer='galore_adamw' needs the package galore_torch"),
        (["--config", "none.yaml"], "config 'none.yaml': no such file"),
        (["--data", "none.jsonl"], "data 'none.jsonl': no such file"),
        (["--base", "./nowhere"], "base './nowhere' does not exist"),
        (["--set", "target_modules=[nothing]"], "target_modules=['nothing']: the base has no such linear"),
        (["--validation", "1"], "validation=1.0: must be a share of the rows"),
        (["--validation", "0.1", "--validation-data", "x.jsonl"], "validation=0.1: goes without --validation-data"),
        (["--lr", "inf"], "learning_rate=inf: must be a finite number"),
        (
            ["--method", "rslora", "--set", "save_dtype=bfloat16"],
            "save_dtype='bfloat16': needs one of the methods lora",
        ),
        (["--method", "adalora", "--rank", "4"], "r=4: AdaLoRA prunes from init_r to target_r: pass these (--set)"),
        (["--data-split", "test"], "data_split='test': needs a data set on the Hub"),
        (["--data-revision", "main"], "data_revision='main': needs a data set on the Hub"),
        (["--base-revision", "main"], "base_revision='main': needs a base on the Hub"),
        (["--set", "router_lr_ratio=2"], "router_lr_ratio=2.0: needs a mixture whose routers learn"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(flags, message, base, rows, tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {"--method": "dora", "--base": base, "--data": rows}
    given = {name: value for name, value in given.items() if name not in flags}
    arguments = [part for pair in given.items() for part in pair]
    assert run("--out", str(tmp_path / "out"), *arguments, *flags) == 1
    assert message in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("package", "flags", "extra"),
    [
        ("bitsandbytes", ["--quantize", "nf4"], "quant"),
        ("wandb", ["--report-to", "wandb"], "report"),
        ("trl", [], "train"),
    ],
)
def test_a_missing_package_is_said_before_anything_is_loaded(
    package, flags, extra, rows, tmp_path, capsys, monkeypatch
):
    from minilora_hub.training import requirements

    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == package else object())
    command = ["--method", "dora", "--base", "no/such-base", "--data", rows, "--out", str(tmp_path / "out"), *flags]
    assert run(*command) == 1
    assert (
        one_line(capsys) == f"minilora: {package} is not installed. It comes with: pip install 'minilora_hub[{extra}]'"
    )


def test_a_launcher_that_asks_for_shards_is_refused(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    command = ["--method", "dora", "--base", "no/such-base", "--data", rows, "--out", str(tmp_path / "out")]
    assert run(*command) == 1
    assert one_line(capsys).startswith("minilora: FSDP: accelerate's is not supported (on CPUs it trains whole copies)")


@pytest.mark.parametrize(
    ("processes", "flags", "words"),
    [
        ("1", ["--method", "dora"], "there is one process, which would hold all of the base"),
        ("2", ["--method", "dora", "--quantize", "nf4"], "quantize='nf4' needs a whole base in each process"),
        ("2", ["--method", "vera"], "method 'vera' is PEFT's; it works with lora, dora, mixlora, mixdora"),
    ],
)
def test_what_cannot_be_split_is_refused(processes, flags, words, rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    where = ["--base", "no/such-base", "--data", rows, "--out", str(tmp_path / "out"), "--set", "shard=true"]
    assert run(*flags, *where) == 1
    assert one_line(capsys).startswith(f"minilora: shard=true: {words}")
    assert not (tmp_path / "out").exists()


def test_it_logs_where_it_is_told_to(base, rows, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    command = ["--method", "dora", "--base", base, "--data", rows, "--out", str(out), "--max-steps", "3"]
    assert run(*command, "--report-to", "tensorboard") == 0
    (file,) = out.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    logged = [event.value for event in events.Scalars("train/loss")]
    losses = [float(line.split(",")[1]) for line in (out / "loss.csv").read_text().splitlines()[1:]]
    assert logged == pytest.approx(losses, abs=1e-5)


def test_skipped_rows_are_counted_and_named(base, tmp_path, capsys):
    file = write_rows(tmp_path / "rows.jsonl", [*colour_rows(8), {"prompt": "no answer"}])
    command = [
        "--method",
        "dora",
        "--base",
        base,
        "--data",
        str(file),
        "--out",
        str(tmp_path / "out"),
        "--max-steps",
        "1",
    ]
    assert run(*command) == 1
    assert "rows.jsonl:9: has no completion" in one_line(capsys)
    assert run(*command, "--skip-bad-rows") == 0
    printed = capsys.readouterr().err
    assert "skipped rows.jsonl:9: has no completion" in printed
    assert "1 row skipped" in printed
    assert "8 rows, 1 skipped" in printed


def test_a_folder_that_is_in_use_is_left_alone(base, rows, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    assert run("--method", "dora", "--base", base, "--data", rows, "--out", str(tmp_path / "out")) == 1
    assert "it must be empty or new" in one_line(capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def test_base_and_rows_come_from_the_hub_and_the_commit_is_kept(base, hub, run_on_hub, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    lines = "".join(json.dumps(row) + "\n" for row in colour_rows(10)).encode()
    token, out = hub.add_user("me"), tmp_path / "out"
    hub.add_repo("me/tiny", files={path.name: path.read_bytes() for path in Path(base).iterdir()})
    hub.add_repo("me/colours-2.5", "dataset", files={"train.jsonl": lines}, private=True)
    command = ["train", "--method", "dora", "--base", "me/tiny", "--out", out, "--max-steps", "1"]
    done = run_on_hub(*command, "--data", "me/colours-2.5", token=token)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "10 rows" in done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["datasets"] == ["me/colours-2.5"]
    config = json.loads((out / "config.json").read_text())
    assert config["base_model_name_or_path"] == results["base"]["id"] == "me/tiny"
    assert re.fullmatch("[0-9a-f]{40}", results["base"]["revision"])
    assert config["base_model_revision"] == results["base"]["revision"]
    assert results["training"]["data"][0]["name"] == "me/colours-2.5"
    missing = run_on_hub(*command[:-3], tmp_path / "other", "--data", "me/none", token=token)
    assert missing.returncode == 1
    assert "data 'me/none': no such file, and no such data set on the Hub" in missing.stderr
