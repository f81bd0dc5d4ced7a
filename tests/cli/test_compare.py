"""`minilora compare`, as a shell and a terminal see it."""

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny_stand_ins as tiny
import torch
from commands import main
from rich.console import Console
from safetensors.torch import load_file, save_file

from minilora_hub.cli.compare import _Answer, _picture, _printable
from minilora_hub.compare.engine import Column, Update


def test_json_has_every_token(saved, capsys):
    """What was said, how sure the model was, who served it; one forward a step for all columns."""
    base, adapters = saved
    code, out = main(capsys, "compare", *adapters, "--base", base, "-p", "Hello", "--max-new-tokens", 5, "--json")
    assert code == 0
    report = json.loads(out.out)
    assert (report["prompt"], report["forwards"]) == ("Hello", 5)
    assert [column["name"] for column in report["columns"]] == ["base", "mix", "dora", "lora"]
    for column in report["columns"]:
        assert column["reason"] == "length"
        assert len(column["tokens"]) == 5
        for token in column["tokens"]:
            assert token["logprob"] < 0
            assert token["alternatives"][0] == {"id": token["id"], "logprob": pytest.approx(token["logprob"])}
            assert ("experts" in token) == (column["name"] == "mix")
    ids = [token["id"] for token in report["columns"][0]["tokens"]]
    assert tiny.byte_tokenizer().decode(ids).startswith(report["columns"][0]["text"])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_base_of_low_precision(saved, capsys, dtype):
    """Every column answers, with log-probabilities near those in float32 and not equal to them."""
    base, adapters = saved
    first = {}
    for chosen in ("float32", dtype):
        arguments = ("--base", base, "-p", "Hello", "--max-new-tokens", 1, "--dtype", chosen, "--json")
        code, out = main(capsys, "compare", *adapters, *arguments)
        assert code == 0
        first[chosen] = [column["tokens"][0]["logprob"] for column in json.loads(out.out)["columns"]]
    assert first[dtype] == pytest.approx(first["float32"], abs=0.3)
    assert all(one != other for one, other in zip(*first.values(), strict=True))


def test_the_base_that_the_adapters_name_needs_no_note(saved, capsys, monkeypatch):
    """By another path to the same folder."""
    base, (mix, *_) = saved
    monkeypatch.chdir(base.parent)
    code, out = main(capsys, "compare", mix, "--base", f"./{base.name}", "-p", "Hi", "--max-new-tokens", 1, "--json")
    assert code == 0
    assert "note:" not in out.err


def test_the_base_is_the_one_that_the_adapters_name(saved, capsys, tmp_path):
    """A given one that they do not name is used, and said; adapters that name several are refused."""
    base, (mix, dora, lora) = saved
    run = ("--prompt", "Hello", "--max-new-tokens", 3, "--json")
    code, out = main(capsys, "compare", mix, dora, *run)
    assert code == 0
    _, named = main(capsys, "compare", mix, dora, "--base", base, *run)
    without_times = [
        [(token["id"], token["logprob"]) for column in json.loads(text.out)["columns"] for token in column["tokens"]]
        for text in (out, named)
    ]
    assert without_times[0] == without_times[1]
    assert "note:" not in named.err
    copied = shutil.copytree(base, tmp_path / "copy")
    code, out = main(capsys, "compare", mix, "--base", copied, *run)
    assert code == 0
    assert f"note: mix names the base '{base}', and runs on '{copied}' here" in out.err
    code, out = main(capsys, "compare", mix, lora, *run)
    assert code == 1
    assert "the adapters do not name one base (mix: " in out.err


def test_a_pipe_gets_the_end_result(saved, capsys):
    """No cursor movements, every column with its figures."""
    base, adapters = saved
    code, out = main(capsys, "compare", *adapters, "--base", base, "-p", "Hello", "--max-new-tokens", 3)
    assert code == 0
    assert "\x1b" not in out.out
    for word in ("base", "mix", "MixLoRA", "dora", "DoRA", "lora", "LoRA"):
        assert word in out.out
    assert out.out.count("3 tokens") == 4
    assert out.out.count("length limit") == 4


def test_the_prompt_from_standard_input(saved, capsys, monkeypatch, tmp_path):
    base, adapters = saved
    (tmp_path / "prompt").write_text("Hello from a pipe")
    with open(tmp_path / "prompt") as file:
        monkeypatch.setattr(sys, "stdin", file)
        code, out = main(capsys, "compare", adapters[0], "--base", base, "--max-new-tokens", 1, "--json")
    assert code == 0
    assert json.loads(out.out)["prompt"] == "Hello from a pipe"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "--prompt '': must not be empty"),
        (["--prompt", "caf\udce9"], "--prompt: must not contain lone surrogates (\\udce9)"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0: must be"),
        (["--prompt", "x", "--top-p", "2"], "top_p=2.0: must be"),
        (["--prompt", "x", "--dtype", "fp8"], "dtype='fp8': must be one of float32, bfloat16, int8"),
        (["--prompt", "x", "no-such-folder"], "'no-such-folder': no such folder"),
    ],
)
def test_wrong_arguments_are_told_in_one_line_before_anything_is_loaded(saved, capsys, arguments, message):
    code, out = main(capsys, "compare", "--base", saved[0], *arguments)
    assert code == 1
    assert out.err.count("\n") == 1
    assert message in out.err


def test_a_column_that_fails_is_the_exit_code(saved, capsys, tmp_path):
    """The others are shown all the same."""
    base, (_, dora, _) = saved
    folder = tmp_path / "huge"
    folder.mkdir()
    for path in dora.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(file).items()}, file)
    code, out = main(capsys, "compare", folder, dora, "--base", base, "-p", "Hello", "--max-new-tokens", 3)
    assert code == 1
    assert "NaN" in out.out
    assert out.out.count("3 tokens") == 2


def test_what_a_model_writes_is_shown_as_text():
    """Neither rich's markup nor control sequences; side by side, or below each other where it is narrow."""
    shown = []
    for name in ("one", "two"):
        answer = _Answer(Column(name, "DoRA"), text="[red]hi[/red] \x1b[31m\x07 zwölf 漢字")
        answer.updates.append(Update(0, tokens=4, finished=True, reason="eos"))
        shown.append(answer)
    pictures = {}
    for width in (40, 100):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(_picture(width, shown))
        pictures[width] = console.export_text()
        assert pictures[width].count("[red]hi[/red] [31m zwölf 漢字") == 2
    assert len(pictures[40].splitlines()) == 2 * len(pictures[100].splitlines())
    assert _printable("a\tb\nc\x1b\x9b") == "a\tb\nc"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a pseudo-terminal")
@pytest.mark.parametrize("interrupted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_a_terminal_it_is_live(saved, interrupted):
    """The picture is painted again and again; Ctrl-C ends it with 130."""
    base, adapters = saved
    command = [sys.executable, "-m", "minilora_hub.cli", "compare", *map(str, adapters), "--base", str(base)]
    command += ["--prompt", "Hello", "--max-new-tokens", "400" if interrupted else "40"]
    outer, inner = pty.openpty()
    environment = os.environ | {"COLUMNS": "140", "LINES": "40", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=subprocess.PIPE, env=environment)
    os.close(inner)
    seen, until = b"", time.monotonic() + 90
    while time.monotonic() < until:
        try:
            chunk = os.read(outer, 65536)
        except OSError:  # the terminal's other end was closed
            break
        if not chunk:
            break
        seen += chunk
        if interrupted and b"tokens" in seen:
            process.send_signal(signal.SIGINT)
            interrupted = None
    error = process.communicate(timeout=30)[1].decode()
    os.close(outer)
    if interrupted is None:
        assert process.returncode == 130, error
        assert "Traceback" not in error
    else:
        assert process.returncode == 0, error
        assert seen.count(b"MixLoRA") > 1
        assert b"\x1b[" in seen
        assert seen.count(b"40 tokens") >= 4


def test_greedy_is_the_default(saved, capsys):
    """Twice the same."""
    base, adapters = saved
    arguments = ["compare", adapters[1], "--base", base, "-p", "Hello", "--max-new-tokens", 8, "--json"]
    torch.manual_seed(0)
    first = json.loads(main(capsys, *arguments)[1].out)
    torch.manual_seed(1)
    second = json.loads(main(capsys, *arguments)[1].out)
    assert [c["text"] for c in first["columns"]] == [c["text"] for c in second["columns"]]


def test_spaces_and_joiners_are_text_and_control_characters_are_not():
    """Words stay apart and emojis whole; nothing moves the cursor."""
    assert (
        _printable("«\u00a0oui\u202f», 日\u3000本, 👩\u200d👧\n\tok")
        == "«\u00a0oui\u202f», 日\u3000本, 👩\u200d👧\n\tok"
    )
    assert _printable("\x1b[31ma\rb\u202ec\x9b") == "[31mabc"


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_only(saved):
    """Boxes and answers are shown with numbers for other characters, and JSON stays JSON."""
    base, adapters = saved
    command = [sys.executable, "-m", "minilora_hub.cli", "compare", adapters[0], "--base", base, "-p", "Où ?"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    for flags in ([], ["--json"]):
        done = subprocess.run(
            [*map(str, command), "--max-new-tokens", "3", *flags], capture_output=True, env=ascii_only, check=False
        )
        assert done.returncode == 0, done.stderr
        if flags:
            assert json.loads(done.stdout.decode("ascii"))["prompt"] == "Où ?"
        else:
            assert "3 tokens" in done.stdout.decode("ascii")
