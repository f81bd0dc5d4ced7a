"""The commands of the documentation from rows to a verified repo, executed as written against a Hub over HTTP."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from commands import run_command, run_on_hub  # noqa: F401  fixtures
from hub.server import HubServer

ROOT = Path(__file__).parent.parent
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


@pytest.fixture
def hub():
    with HubServer() as server:
        server.add_repo(BASE, files={"config.json": b"{}", "README.md": b"---\nlicense: apache-2.0\n---\n"})
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/publish.md", "README.md"])
def test_rows_become_a_verified_repo(page, hub, run_on_hub, tmp_path):  # noqa: F811
    (tmp_path / "data.jsonl").write_text(blocks("docs/publish.md", "jsonl")[0], encoding="utf-8")
    token = hub.add_user("me")
    commands = next(block for block in blocks(page, "bash") if "minilora train" in block).strip().splitlines()
    outputs = {}
    for command in commands:
        program, *arguments = shlex.split(command, comments=True)
        if program != "minilora":
            assert program == "pip"
            continue
        if arguments[0] == "push" and not {"--yes", "--dry-run"} & {*arguments}:
            arguments.append("--yes")  # where a person is asked
        done = run_on_hub(*arguments, token=token)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        outputs[arguments[0] + (" --dry-run" if "--dry-run" in arguments else "")] = done.stdout

    assert re.match(r"colours: \d+ steps", outputs["train"])
    assert "Nothing was sent." in outputs["push --dry-run"]
    assert "adapter_model.safetensors" in outputs["push --dry-run"]
    assert f"base_model: {BASE}" in outputs["push --dry-run"]
    repo = hub.repo("me/colours")
    assert repo.private
    files = repo.files("v1" if page == "docs/publish.md" else "main")
    assert {"config.json", "adapter_model.safetensors", "README.md", "results.json", "verification.json"} <= set(files)
    assert "adapter_config.json" not in files
    assert not [name for name in files if "checkpoint" in name or name in ("training.yaml", "loss.csv")]
    card = files["README.md"].decode()
    assert f"base_model: {BASE}" in card
    if page == "docs/publish.md":
        assert "Colours of things, written by hand." in card
        assert "DoRA" in outputs["info"]
        assert BASE in outputs["info"]
