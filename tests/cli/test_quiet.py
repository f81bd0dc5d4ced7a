"""What other libraries print stays off the screen, in our commands and functions, and comes back afterwards."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import datasets
import pytest
from hub.server import HubServer
from huggingface_hub import snapshot_download
from huggingface_hub.utils import are_progress_bars_disabled
from processes import run_python
from tiny_training import write_base, write_rows
from transformers.utils import logging as transformers_logging

from minilora_hub import quiet
from minilora_hub.hub.download_bar import download_bar
from minilora_hub.quiet import quiet_libraries, quiet_process

BASE = ["--base", "{base}"]
TRAIN = [*BASE, "--data", "{rows}", "--set", "max_steps=1", "--set", "batch_size=4"]
COMMANDS = [
    ("train nf4", ["train", *TRAIN, "--method", "dora", "--quantize", "nf4", "--out", "{out}/dora"]),
    ("train int8", ["train", *TRAIN, "--method", "mixlora", "--quantize", "int8", "--out", "{out}/mixlora"]),
    ("compare", ["compare", "{out}/dora", "{out}/mixlora", *BASE, "--prompt", "Hi", "--max-new-tokens", "4"]),
    ("eval", ["eval", "{out}/dora", *BASE, "--task", "dates", "--count", "2", "--few-shot", "0"]),
    (
        "push",
        ["push", "{out}/dora", "ana/dora", *BASE, "--base-id", "org/base", "--license", "mit", "--yes", "--no-verify"],
    ),
    ("info", ["info", "ana/dora"]),
    ("list", ["list"]),
    ("pull", ["pull", "ana/dora", "--out", "{out}/pulled"]),
    ("card", ["card", "{out}/dora"]),
    ("export", ["export", "{out}/dora", *BASE, "--to", "dense", "--out", "{out}/dense"]),
    ("import", ["import", "{out}/pulled/peft", *BASE, "--out", "{out}/imported"]),
    ("demo", ["demo", "{out}/dora", *BASE, "--no-browser"]),
    ("verify", ["verify", "ana/dora", *BASE]),
    ("train pissa", ["train", *TRAIN, "--method", "pissa", "--out", "{out}/pissa"]),
    ("train lora", ["train", *TRAIN, "--method", "lora", "--validation", "0.25", "--out", "{out}/lora"]),
    ("combine", ["combine", "{out}/lora", "{out}/pissa", *BASE, "--method", "cat", "--out", "{out}/both"]),
    ("sweep", ["sweep", *TRAIN, "--method", "dora", "--vary", "r=2,4", "--out", "{out}/sweep"]),
    ("tasks", ["tasks", "--out", "{out}/tasks", "--count", "5"]),
    ("experts", ["experts", "add", "{out}/mixlora", *BASE, "--clone", "0", "--out", "{out}/more"]),
    ("export moe", ["export", "{out}/mixlora", *BASE, "--to", "moe", "--out", "{out}/moe"]),
    ("space", ["space", "push", "ana/space", "ana/dora", "--base", "org/base", "--secret", "HF_TOKEN", "--wait", "0"]),
]


@pytest.mark.slow
def test_commands_show_only_what_is_ours(tmp_path):
    """One process for all, as each would import the same libraries for seconds; the CPU's kernels are not found."""
    base = write_base(tmp_path / "base")
    places = {"base": base, "rows": write_rows(tmp_path / "rows.jsonl"), "out": tmp_path}
    filled = [(name, [argument.format(**places) for argument in arguments]) for name, arguments in COMMANDS]
    asked, told = tmp_path / "commands.json", tmp_path / "told.json"
    asked.write_text(json.dumps(filled))
    with HubServer(lfs_threshold=10_000) as hub:
        files = {path.name: path.read_bytes() for path in base.iterdir()}
        hub.add_repo("org/base", files={**files, "README.md": b"---\nlicense: mit\n---\n"})
        environment = os.environ | hub.environment(hub.add_user("ana"), cache_dir=tmp_path / "hf")
        environment |= {"MINILORA_CACHE": str(tmp_path / "cache"), "MINILORA_DATA": str(tmp_path / "data")}
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "PYTHONWARNINGS"):
            environment.pop(name, None)
        script = Path(__file__).with_name("quiet_commands.py")
        command = [sys.executable, str(script), str(asked), str(told)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(told.read_text())
    failed = {name: one for name, one in said.items() if one["code"] != (130 if name == "demo" else 0)}
    assert failed == {}
    assert {name: one["foreign"] for name, one in said.items() if one["foreign"]} == {}
    for name, shown in (("train nf4", "trainable"), ("compare", "Loading the base"), ("push", "✓ Sending")):
        assert shown in said[name]["ours"]


def test_libraries_that_are_imported_later_are_quiet_as_well():
    """In a process of its own: bars, notes and notices of libraries; what we or the user's code warn of is shown."""
    code = """
import logging, os, warnings
from minilora_hub.quiet import quiet_process
with quiet_process():
    import datasets, huggingface_hub, transformers
    from transformers.utils import logging as notes
    print(notes.is_progress_bar_enabled(), notes.get_verbosity())
    print(huggingface_hub.utils.are_progress_bars_disabled(), datasets.are_progress_bars_disabled())
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
    logging.getLogger("transformers.models").warning("a note")
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.warn(f"a notice of {category.__name__}", category)
    logging.getLogger("bitsandbytes").error("an error")
    warnings.warn("what the user should know")
"""
    done = run_python(code)
    assert done.stdout.splitlines() == [f"False {logging.ERROR}", "True True"]
    lines = re.sub(r"(?m)^.*UserWarning: ", "", done.stderr).splitlines()
    assert lines[:2] == ["an error", "what the user should know"]
    assert "notice" not in done.stderr


def state():
    """Everything that is switched: bars, and loggers."""
    bars = [transformers_logging.is_progress_bar_enabled(), transformers_logging._tqdm_hook]
    bars += [are_progress_bars_disabled(), datasets.are_progress_bars_disabled()]
    return bars, {name: logging.getLogger(name).level for name in quiet.LOGGERS}


def shown_bars(capsys):
    """Which of the three libraries' bars are drawn."""
    from huggingface_hub.utils import tqdm as hub_tqdm

    list(transformers_logging.tqdm([1], desc="T"))
    list(hub_tqdm([1], desc="H"))
    list(datasets.utils.tqdm([1], desc="D"))
    drawn = capsys.readouterr().err
    return {name for name in "THD" if f"{name}: " in drawn}


def test_everything_is_put_back(capsys):
    before = state()
    assert shown_bars(capsys) == {"T", "H", "D"}
    with contextlib.suppress(KeyError), quiet_libraries():
        assert shown_bars(capsys) == set()
        assert logging.getLogger("transformers").level == logging.ERROR
        with quiet_libraries():
            assert shown_bars(capsys) == set()
        assert shown_bars(capsys) == set()
        raise KeyError
    assert state() == before
    assert shown_bars(capsys) == {"T", "H", "D"}
    with quiet_process():
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    assert state() == before


def test_loading_a_base_from_python_draws_nothing(tmp_path, capsys):
    """For people who call our functions and not our commands."""
    from minilora_hub.bases import resolve_base
    from minilora_hub.bases.loading import load_base, load_tokenizer

    base = write_base(tmp_path)
    capsys.readouterr()
    load_base(resolve_base(base))
    load_tokenizer(resolve_base(base))
    assert capsys.readouterr().err == ""
    assert shown_bars(capsys) == {"T", "H", "D"}


def test_what_the_user_has_switched_off_stays_off(capsys):
    transformers_logging.disable_progress_bar()
    try:
        with quiet_libraries():
            pass
        assert shown_bars(capsys) == {"D"}
    finally:
        transformers_logging.enable_progress_bar()


def test_from_several_threads_the_last_one_puts_back(capsys):
    before, inside, leave = state(), threading.Event(), threading.Event()

    def other():
        with quiet_libraries():
            inside.set()
            leave.wait(10)

    with quiet_libraries():
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
    assert shown_bars(capsys) == set()
    leave.set()
    thread.join()
    assert state() == before


def test_warnings_that_are_asked_for_are_shown(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with quiet_process(), pytest.warns(FutureWarning, match="a notice"):
        warnings.warn("a notice", FutureWarning, stacklevel=1)


@pytest.mark.parametrize(("shown", "terminal"), [(True, True), (True, False), (False, True)])
def test_a_download_has_one_bar_of_ours_on_a_terminal(shown, terminal, tmp_path, monkeypatch):
    """And it is removed when everything is there."""

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setattr(sys, "stderr", screen := Screen())
    with HubServer(lfs_threshold=10) as hub:
        hub.add_repo("org/tiny", files={"config.json": b"{}", "model.safetensors": b"0" * 5000})
        bar = download_bar("org/tiny", shown)
        snapshot_download("org/tiny", endpoint=hub.endpoint, cache_dir=tmp_path, token=False, tqdm_class=bar)
    drawn = screen.getvalue()
    assert bool(re.search(r"\rFetching org/tiny: +\d+% of 5.69kB", drawn)) == (shown and terminal), drawn
    assert not re.search(r"files|Reconstruct|Download|it/s", drawn)
    assert not drawn or drawn.endswith(" \r"), "the line is wiped"


def test_ctrl_c_at_its_end_leaves_no_bars_for_the_next_block(monkeypatch):
    """A bar that is drawn although its stream may be gone leaves its lock taken, and every later upload would wait."""
    from huggingface_hub import constants
    from huggingface_hub import utils as hub

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    enable, interrupts = hub.enable_progress_bars, [KeyboardInterrupt]

    def interrupted(*names):
        enable(*names)
        if interrupts:
            raise interrupts.pop()

    hub.enable_progress_bars()
    monkeypatch.setattr(hub, "enable_progress_bars", interrupted)
    with pytest.raises(KeyboardInterrupt), quiet_libraries():
        assert hub.are_progress_bars_disabled()
    with quiet_libraries():
        assert hub.are_progress_bars_disabled()
    assert not hub.are_progress_bars_disabled()
