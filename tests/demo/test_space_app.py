"""A staged Space, started as the Hub would: app.py in a fresh process, in a folder that holds nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request

import pytest
from gradio_client import Client
from processes import free_port

from minilora_hub.publish.space.files import SpaceSettings, stage

SETTINGS = ("MINILORA_", "GRADIO_", "PYTHONPATH", "SPACES_", "HF_TOKEN")


def environment(**variables):
    """That of a bare machine, as far as the page goes."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    return bare | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    settings = SpaceSettings("compare")
    stage(folder, settings)
    return folder, settings.variables()


@pytest.mark.slow
def test_it_runs_and_answers(staged):
    """The embedded base and the shipped adapters, with the staged package and no other, by the staged variables."""
    folder, variables = staged
    port = free_port()
    # As `python app.py` does: the folder of app.py comes first on the path.
    program = (
        "import runpy, sys\nsys.path.insert(0, '')\nimport minilora_hub\nprint(minilora_hub.__file__, flush=True)\n"
        "runpy.run_path('app.py', run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment(GRADIO_SERVER_PORT=str(port), MINILORA_MAX_TOKENS="8", **variables),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline().strip() == str(folder / "minilora_hub" / "__init__.py")
        address = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(address, timeout=10).close()
                break
            except OSError:
                assert process.poll() is None, "app.py ended; see its traceback above"
                assert time.monotonic() < deadline
                time.sleep(0.5)
        client = Client(address, verbose=False)
        asked = {"max_new_tokens": 8, "experts": True, "api_name": "/compare"}
        items = list(client.submit("Write as YYYY-MM-DD: January 30, 1916", **asked))
        rows = {row["name"]: row for row in items[-1]["rows"]}
        methods = ["lora", "dora", "mixlora", "mixdora"]
        assert list(rows) == ["SmolLM2-135M-Instruct", *(f"smollm2-135m-{method}" for method in methods)]
        assert all(row["error"] is None and row["text"] for row in rows.values())
        assert all(rows[f"smollm2-135m-{method}"]["text"].startswith("1916-0") for method in methods)
        experts = rows["smollm2-135m-mixlora"]["experts"]
        assert len(experts) == rows["smollm2-135m-mixlora"]["tokens"]
        assert all(len(token) == 30 and all(len(layer) == 2 for layer in token) for token in experts)
        assert rows["smollm2-135m-dora"]["experts"] == []
        with pytest.raises(Exception, match="max_new_tokens=9: this page gives at most 8 an answer"):
            client.predict("hi", max_new_tokens=9, api_name="/compare")
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()
    assert not list(folder.rglob("*.pyi"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MINILORA_MAX_TOKENS": "lots"}, "app.py: MINILORA_MAX_TOKENS='lots': must be a whole number of at least 1"),
        ({"MINILORA_ADAPTERS": "./gone"}, "app.py: adapter 'gone': no such folder"),
    ],
)
def test_a_wrong_variable_stops_it_with_one_line(staged, variables, message):
    """Before a model is loaded."""
    folder, _ = staged
    done = subprocess.run(
        [sys.executable, "app.py"],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == message
    assert "Traceback" not in done.stderr
    assert "Loading" not in done.stdout
