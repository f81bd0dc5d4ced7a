"""The command line, as a shell sees it: what it prints, where, and with which exit code."""

import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from commands import main

from minilora_hub.cli import demo
from minilora_hub.errors import MissingExtraError


def test_help_lists_the_commands_and_loads_nothing_heavy():
    """In a fresh interpreter: no torch, transformers or gradio for `--help`."""
    program = (
        "import sys, minilora_hub.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as end: code = end.code\n"
        "heavy = {'torch', 'transformers', 'gradio', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("demo", "--debug", "--version"):
        assert word in done.stdout


def test_help_of_a_command_shows_an_example(capsys):
    """Every command says how it is used."""
    code, out = main(capsys, "demo", "--help")
    assert code == 0
    assert "Example: minilora demo" in out.out


def test_version(capsys):
    """One line with a number."""
    code, out = main(capsys, "--version")
    assert code == 0
    assert out.out.startswith("minilora ")


@pytest.mark.parametrize("arguments", [["--bogus"], ["demo", "--bogus"], ["nonsense"], ["demo", "--port", "x"], []])
def test_wrong_usage_exits_with_2(capsys, arguments):
    """Usage errors are told apart from failures."""
    assert main(capsys, *arguments)[0] == 2


def test_a_word_that_is_no_choice_is_told_in_our_words(capsys):
    code, out = main(capsys, "import", "a", "b", "--route", "nonsense")
    assert code == 2
    assert "Invalid value for '--route': 'nonsense' is not one of 'blocks', 'all-linears'." in out.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "--router", "arrow"], "--router arrow: has no effect on one adapter: leave it out"),
        (["a", "--attention", "drop"], "--attention drop: has no effect on one adapter"),
        (
            ["a", "b", "--temperature", "2"],
            "--temperature 2.0: has no effect on several LoRAs with a router that is fresh",
        ),
        (
            ["a", "b", "--router", "arrow", "--seed", "1"],
            "--seed 1: has no effect on several LoRAs with a router that is",
        ),
        (["a", "b", "--reference-dora", "trained"], "--reference-dora trained: has no effect on several LoRAs"),
        (["./a", "--revision", "main"], "revision='main': './a' is a folder, which has no revisions"),
    ],
)
def test_options_of_an_import_that_would_be_ignored_are_refused(arguments, words, capsys, tmp_path):
    code, out = main(capsys, "import", *arguments, "--out", str(tmp_path / "out"))
    assert code == 1
    assert words in out.err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("export a --to peft --dtype float16", "--dtype float16: has no effect on --to peft: leave it out"),
        ("export a --to peft --dequantize", "--dequantize: has no effect on --to peft: leave it out"),
        ("export a --to mixlora --dtype auto", "--dtype auto: has no effect on --to mixlora"),
        ("export a --to mixtral --dequantize", "--dequantize: has no effect on --to mixtral"),
        ("export a --to moe --dequantize", "--dequantize: has no effect on --to moe"),
        ("combine a b --density 0.9", "--density 0.9: has no effect on --method svd"),
        ("combine a b --method cat --seed 7", "--seed 7: has no effect on --method cat"),
        ("combine a b --method ties --seed 7", "--seed 7: has no effect on --method ties"),
        ("experts add a --clone 0 --seed 4", "--seed 4: has no effect on clones without --noise"),
    ],
)
def test_options_of_other_conversions_that_would_be_ignored_are_refused(command, words, capsys, tmp_path):
    code, out = main(capsys, *command.split(), "--out", str(tmp_path / "out"))
    assert code == 1
    assert words in out.err


@pytest.mark.parametrize(
    "command",
    [
        "combine a b --method dare_linear --seed",
        "import ./a ./b --route all-linears --seed",
        "compare a --prompt hi --seed",
    ],
)
@pytest.mark.parametrize("seed", [2**63, -1])
def test_a_seed_that_no_generator_takes_is_told_by_name(command, seed, capsys, tmp_path):
    out_option = [] if command.startswith("compare") else ["--out", str(tmp_path / "out")]
    code, out = main(capsys, *command.split(), seed, *out_option)
    assert code == 1
    assert f"seed={seed}: must be an integer from 0 to 2**63 - 1" in out.err


def test_a_missing_adapter_is_one_line_and_exit_code_1(run_command, tmp_path):
    """No traceback, and the base is not loaded in vain."""
    done = run_command("demo", tmp_path / "gone", "--base", tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("minilora: ")
    assert "gone" in last
    assert "Loading" not in done.stderr


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(capsys, tmp_path, place):
    """Before or after the command's name."""
    arguments = ["demo", tmp_path / "gone"]
    arguments.insert(0 if place == "before" else 1, "--debug")
    code, out = main(capsys, *arguments)
    assert code == 1
    assert "Traceback" in out.err
    assert "AdapterError" in out.err


def test_a_busy_port_is_told_before_anything_is_loaded(capsys):
    """The message names the port and the way out."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out = main(capsys, "demo", "--port", port)
    assert code == 1
    assert len(out.err.splitlines()) == 1
    assert f"port {port}" in out.err
    assert "--port" in out.err


def test_without_a_port_the_next_free_one_is_taken(monkeypatch):
    """A second demo beside the first just works."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(demo, "FIRST_PORT", port)
        monkeypatch.setattr(demo, "LAST_PORT", port + 20)
        assert port < demo.free_port("127.0.0.1", None) <= port + 20


def test_a_host_that_is_none(capsys):
    """Not a traceback from the socket library."""
    code, out = main(capsys, "demo", "--host", "no.such.host.invalid")
    assert code == 1
    assert "no.such.host.invalid" in out.err


def test_a_missing_extra_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    """Without gradio: the line to type."""
    for name in [name for name in sys.modules if name.startswith("minilora_hub.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, out = main(capsys, "demo", tmp_path)
    assert code == 1
    assert str(MissingExtraError("gradio", "demo")) in out.err


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"DISPLAY": ":0"}, True),
        ({"DISPLAY": ":0", "CI": "1"}, False),
        ({"DISPLAY": ":0", "SSH_CONNECTION": "x"}, False),
    ],
)
def test_a_browser_is_opened_only_where_there_is_a_screen(monkeypatch, environment, expected):
    """On Linux: a display, not over SSH, not in CI."""
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "CI", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert demo._has_screen() is expected


def interrupted(process):
    """Press Ctrl-C and wait: exit code, everything that was printed since."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def start(*arguments):
    """Start the command line without waiting for it."""
    command = [sys.executable, "-m", "minilora_hub.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_while_loading_ends_quietly(tmp_path):
    """Not a word. (An extension being imported may hold the default handler; a shell shows 130 then, too.)"""
    process = start("demo", tmp_path)
    assert "Starting" in process.stderr.readline()
    time.sleep(0.5)
    code, printed = interrupted(process)
    assert code in (130, -signal.SIGINT)
    assert printed == ""


def test_ctrl_c_is_not_swallowed_by_a_module_that_is_being_imported(tmp_path):
    """Torch, pydantic and others catch whatever is raised while they set themselves up."""
    (tmp_path / "swallows.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    code = "from minilora_hub.cli import app\nwith app._signals_unwind():\n    import swallows\nprint('went on')"
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")


@pytest.mark.slow
def test_demo_serves_adapters_from_folders(saved):
    """A base and adapters out of folders, the address on stdout, the page behind it, and a quiet end."""
    base, adapters = saved
    process = start("demo", *adapters, "--base", base, "--no-browser")
    address = process.stdout.readline().split()[1]
    for _ in range(100):
        try:
            with urllib.request.urlopen(address, timeout=5) as page:  # http://127.0.0.1, printed by us
                html = page.read().decode()
            break
        except OSError:
            time.sleep(0.1)
    code, printed = interrupted(process)
    assert code == 130
    assert "minilora · compare" in html
    assert all(f"+ {folder.name}: " in printed for folder in adapters)
    assert "Traceback" not in printed
