"""`minilora serve` as a process: the address, an answer, a key from the environment, Ctrl-C during a stream."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from commands import run_command
from processes import wait_until

from minilora_hub import cli

__all__ = ["run_command"]


def test_serve_answers_and_ends_quietly(saved):
    base, adapters = saved
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "minilora_hub.cli", "serve", *adapters, "--base", base, "--port", port]
    environment = os.environ | {"MINILORA_API_KEY": "secret"}
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout.readline() == f"Serving 4 models at http://127.0.0.1:{port}/v1 (Ctrl-C ends it)\n"
        address = f"http://127.0.0.1:{port}"

        def healthy():
            try:
                return httpx.get(f"{address}/health").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(healthy, 30)
        request = {"model": "mix", "prompt": "Hi.", "max_tokens": 400, "temperature": 0, "stream": True}
        assert httpx.post(f"{address}/v1/completions", json=request).status_code == 401
        key = {"Authorization": "Bearer secret"}
        with httpx.stream("POST", f"{address}/v1/completions", json=request, headers=key, timeout=60) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" or "shutting down" in rest[-1]
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "secret" not in out + err
    assert "Traceback" not in err


def test_an_empty_key_is_not_none(monkeypatch, capsys):
    """A variable that is set from one that is unset must not open the server to everybody."""
    monkeypatch.setenv("MINILORA_API_KEY", "")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve"])
    assert exit_.value.code == 1
    assert "--api-key '': must hold some text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--api-key", " "], "--api-key ''"),
        (["--adapter-dir", "gone"], "'gone': there is no such folder"),
        (["gone"], "gone"),
        (["--route", "gone"], "index 'gone' cannot be read"),
        (["--host", "no.such.host.invalid"], "host='no.such.host.invalid': is not an address of this machine"),
        (["--host", "192.0.2.1"], "host='192.0.2.1': is not an address of this machine"),
        (["--base", "{dora}"], "is an adapter, not a base model"),
        (["--base", "{lora}"], "is an adapter, not a base model"),
    ],
)
def test_what_cannot_be_served_is_one_line(run_command, saved, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    folders = {path.name: path for path in saved[1]}
    arguments = [argument.format(**folders) for argument in arguments]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = run_command("serve", "--base", saved[0], "--port", port, *arguments)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
