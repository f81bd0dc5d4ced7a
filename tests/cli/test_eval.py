"""`minilora eval`, as a shell sees it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_stand_ins as tiny
from evaluation.small_tasks import small_tasks  # noqa: F401  a fixture

from minilora_hub import cli
from minilora_hub.adapter_folder.results import Base, Results

pytestmark = pytest.mark.usefixtures("small_tasks")


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    return tiny.save_base_and_adapters(tmp_path)


def main(capsys, *arguments):
    """Run it in this process: exit code and output."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["eval", *map(str, arguments)])
    return exit_.value.code, capsys.readouterr()


def test_a_table_and_the_numbers_in_the_folders(saved, capsys):
    base, (mix, dora, _) = saved
    Results("dora", Base("org/base"), license="mit").save(dora)
    arguments = [mix, dora, "--base", base, "--few-shot", 2, "--perplexity", "--batch-size", 8]
    code, out = main(capsys, *arguments)
    assert code == 0, out.err
    lines = [line.rstrip() for line in out.out.splitlines()]
    headers = [line for line in lines if not line.startswith("  ")]
    assert headers == [
        "Say it again: exact match, 11 items",
        "As a record: exact match, 10 items",
        "As a record: JSON field F1, 10 items",
        "echo, record together: exact match, 21 items",
        "general text: perplexity, 64 items, lower is better",
    ]
    assert [line.split("   ")[0].strip() for line in lines[1:5]] == ["base", "base, 2 examples", str(mix), str(dora)]
    assert lines[1].split("   ", 1)[1].split() == ["0", "0", "to", "0.259"]  # Wilson's for 0 of 11
    assert "\x1b" not in out.out
    assert "rows/s" in out.err
    assert f"wrote {mix / 'results.json'}" in out.err
    first = {folder: (folder / "results.json").read_bytes() for folder in (mix, dora)}
    results = Results.load(dora)
    assert results.license == "mit"
    assert [(row.task, row.metric) for row in results.evaluation] == [
        ("Say it again", "exact match"),
        ("As a record", "exact match"),
        ("As a record", "JSON field F1"),
        ("echo, record together", "exact match"),
        ("general text", "perplexity"),
    ]
    assert [use.task for use in Results.load(mix).router] == ["Say it again", "As a record"]
    for extra in ([], ["--fresh"]):  # known, and computed anew
        code, out = main(capsys, *arguments, *extra)
        assert code == 0
        assert ("0 rows computed" in out.err) == (not extra)
        assert {folder: (folder / "results.json").read_bytes() for folder in (mix, dora)} == first

    # The recorded command measures the same again, alone.
    command = results.evaluation[0].command.replace("DIR", str(dora)).replace("BASE", str(base)).split()
    assert command[:2] == ["minilora", "eval"]
    code, out = main(capsys, *command[2:], "--fresh")
    assert code == 0, out.err
    assert (dora / "results.json").read_bytes() == first[dora]


def test_out_and_json_leave_the_folders_alone(saved, capsys, tmp_path):
    base, (mix, _, lora) = saved
    out = tmp_path / "report.json"
    code, said = main(capsys, mix, lora, "--base", base, "--task", "record", "--count", 3, "--out", out, "--json")
    assert code == 0, said.err
    report = json.loads(said.out)
    written = json.loads(out.read_text())
    assert report == written
    assert [model["name"] for model in report["models"]] == ["base", "base, 4 examples", str(mix), str(lora)]
    assert [len(model["answers"]["record"]) for model in report["models"]] == [3] * 4
    assert report["models"][0]["answers"]["record"][0].keys() == {"text", "exact", "f1"}
    assert report["items"]["record"][1]["reference"] == '{"n": 1}'
    assert not (mix / "results.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "Missing argument 'ADAPTER"),
        (["--few-shot", "many"], 2, "Invalid value for '--few-shot'"),
        (["ADAPTER", "--task", "ecko"], 1, "task='ecko': must be one of echo, record"),
        (["ADAPTER", "--split", "all"], 1, "split='all': must be one of"),
        (["ADAPTER", "--batch-size", "0"], 1, "batch_size=0: must be at least 1"),
        (["ADAPTER", "--out", "no/such/folder/x.json"], 1, "--out 'no/such/folder/x.json': must be a file in a folder"),
        (
            ["ADAPTER", "--out", "RESULTS"],
            1,
            "results.json': is written, in a form of its own, where --out is left out",
        ),
        (["DAMAGED"], 1, "results.json"),
        (["no-such-folder"], 1, "adapter 'no-such-folder': no such folder"),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_loaded(saved, capsys, monkeypatch, arguments, code, said):
    monkeypatch.setattr("minilora_hub.evaluation.run.load_base", lambda *_, **__: pytest.fail("loaded"))
    base, adapters = saved
    (adapters[1] / "results.json").write_text('{"format_version": 1')  # known before hours of measuring
    named = {"ADAPTER": adapters[0], "DAMAGED": adapters[1], "RESULTS": adapters[0] / "results.json"}
    found, out = main(capsys, *[named.get(argument, argument) for argument in arguments], "--base", base)
    assert found == code
    assert said in " ".join(out.err.split())
    assert code == 2 or out.err.count("\n") == 1


@pytest.mark.parametrize("missing", ["scipy", "babel"])
def test_a_missing_extra_is_named_before_anything_is_loaded(saved, capsys, monkeypatch, missing):
    from minilora_hub.errors import MissingExtraError
    from minilora_hub.evaluation.tasks.items import Task

    monkeypatch.setattr("minilora_hub.evaluation.run.load_base", lambda *_, **__: pytest.fail("loaded"))
    if missing == "scipy":
        monkeypatch.setitem(sys.modules, "scipy.stats", None)
    else:

        def make(split):
            raise MissingExtraError("babel", "eval")

        monkeypatch.setattr(
            "minilora_hub.evaluation.tasks.registry.TASKS", {"dates": Task("dates", "Dates", "exact", make)}
        )
    code, out = main(capsys, saved[1][0], "--base", saved[0])
    assert code == 1
    assert f"minilora: {missing} is not installed. It comes with: pip install 'minilora_hub[eval]'" in out.err


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from evaluation.small_tasks import TASKS
import minilora_hub.evaluation.tasks.registry, minilora_hub.evaluation.run as run
minilora_hub.evaluation.tasks.registry.TASKS = TASKS
generate = run.generate
def slow(*args):
    time.sleep(0.3)
    return generate(*args)
run.generate = slow
from minilora_hub import cli
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_process_that_is_stopped_goes_on(saved, capsys, tmp_path, number):
    """Ctrl-C: 130 and one word; then, and after kill -9, what was computed is not computed again."""
    base, (mix, _, lora) = saved
    script = tmp_path / "eval.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))
    out = tmp_path / "out.json"
    arguments = ["eval", str(mix), str(lora), "--base", str(base), "--batch-size", "2", "--few-shot", "0"]
    arguments += ["--out", str(out)]
    process = subprocess.Popen([sys.executable, script, *arguments], stderr=subprocess.PIPE, text=True)
    answers = tmp_path / "cache" / "evaluation"
    until = time.monotonic() + 120
    while time.monotonic() < until and sum(path.read_text().count("\n") for path in answers.glob("*")) < 3:
        time.sleep(0.05)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number), error
    assert "Traceback" not in error
    assert not out.exists()
    code, said = main(capsys, *arguments[1:])
    assert code == 0
    computed = int(said.err.split(" rows computed")[0].split()[-1])
    assert computed <= 3 * 21 - 3 * 2
    resumed = json.loads(out.read_text())
    assert main(capsys, *arguments[1:], "--fresh")[0] == 0
    fresh = json.loads(out.read_text())
    for report in (resumed, fresh):
        del report["seconds"], report["rows_computed"]
    assert resumed == fresh
