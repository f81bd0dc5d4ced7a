"""Commands in this process, which has loaded torch already, against a Hub over HTTP."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass

import huggingface_hub
import pytest

from minilora_hub import cli


@dataclass
class Done:
    """How a command ended, with the names that `subprocess` gives it."""

    returncode: int
    stdout: str
    stderr: str


def main(capsys, *arguments: object):
    """Run the command line in this process: exit code and output; what was written before is left out."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code, capsys.readouterr()


@pytest.fixture
def run_command(capsys):
    """A function that runs the command line in this process."""

    def run(*arguments: object) -> Done:
        code, output = main(capsys, *arguments)
        return Done(code, *output)

    return run


@pytest.fixture
def run_on_hub(run_command, hub, tmp_path, monkeypatch):
    """A function that runs the command line on the fixture `hub`, in an empty folder, with a token and variables."""
    cache = tmp_path / "hf"
    monkeypatch.chdir(tmp_path)
    hub.use_in_process(monkeypatch, cache)

    def run(*arguments: object, token: str | None, stdin: str = "", **variables: str) -> Done:
        for name, value in {**hub.environment(token, cache_dir=cache), **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        done = run_command(*arguments)
        assert "Traceback" not in done.stderr
        return done

    yield run
    huggingface_hub.close_session()
