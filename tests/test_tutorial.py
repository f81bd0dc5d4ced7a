"""The tutorial of docs/publish.md, executed as written against a Hub over HTTP."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub.server import HubServer

PAGE = (Path(__file__).parent.parent / "docs" / "publish.md").read_text(encoding="utf-8").split("\n## ")[0]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Every command of the tutorial, run in a shell in an empty folder: the Hub, and each command's output."""
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "data.jsonl").write_text(block("jsonl"), encoding="utf-8")
    with HubServer() as hub:
        hub.add_repo(BASE, files={"config.json": b"{}", "README.md": b"---\nlicense: apache-2.0\n---\n"})
        environment = hub.environment(token=hub.add_user("me"), cache_dir=folder / "cache")
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.environ['PATH'])}"
        outputs = {}
        for command in block("bash").strip().splitlines():
            ran = subprocess.run(
                command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
            )
            assert ran.returncode == 0, f"{command}\n{ran.stdout[-2000:]}\n{ran.stderr[-3000:]}"
            outputs[command.split()[1] + (" --dry-run" if "--dry-run" in command else "")] = ran.stdout
        yield hub, outputs


def test_the_repo_is_there_complete_private_and_tagged(done):
    hub, _ = done
    repo = hub.repo("me/colours")
    assert repo.private
    assert {"config.json", "adapter_model.safetensors", "README.md", "results.json", "verification.json"} <= set(
        repo.files("v1")
    )
    assert "adapter_config.json" not in repo.files("v1")
    card = repo.files("v1")["README.md"].decode()
    assert f"base_model: {BASE}" in card
    assert "Colours of things, written by hand." in card
    assert not [name for name in repo.files("v1") if "checkpoint" in name or name in ("training.yaml", "loss.csv")]


def test_training_tells_the_plan_first_and_the_folder_last(done):
    _, outputs = done
    assert outputs["train"].startswith("colours: 6 steps")


def test_the_dry_run_sends_nothing_and_shows_everything(done):
    _, outputs = done
    assert "Nothing was sent." in outputs["push --dry-run"]
    assert "adapter_model.safetensors" in outputs["push --dry-run"]
    assert f"base_model: {BASE}" in outputs["push --dry-run"]


def test_info_tells_what_it_is(done):
    _, outputs = done
    assert "DoRA" in outputs["info"]
    assert BASE in outputs["info"]
