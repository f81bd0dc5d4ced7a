"""The section "Serve it" of a card: its commands parse, and promise nothing that the adapter's kind cannot do."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
from processes import free_port
from publish.examples import CONFIG, card_folder, full_results, minimal_results

from minilora_hub.adapter_folder.code import endpoint_files
from minilora_hub.integrations.vllm.plugin import TESTED_VERSIONS
from minilora_hub.publish.card.render import render_card

DORA = {"model_type": "dora", "r": 12, "lora_alpha": 24, "target_modules": "all-linear"}


def section(tmp_path, method="mixlora", config=None, repo_id="ana/dates", **changes) -> str:
    results = full_results(**changes) if method == "mixlora" else minimal_results(method)
    folder = card_folder(tmp_path / "card", results, config or (CONFIG if method == "mixlora" else DORA))
    card = render_card(folder, repo_id=repo_id)
    return card[card.index("## Serve it") : card.index("## Results")]


def commands(text: str) -> list[list[str]]:
    """Every command of the section's code blocks, split as a shell does."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines()]


def command(text: str, *start: str) -> list[str]:
    (found,) = [words for words in commands(text) if tuple(words[: len(start)]) == start]
    return found


def test_a_mixlora(tmp_path):
    text = section(tmp_path)
    assert command(text, "minilora") == ["minilora", "serve", "ana/dates", "--base", "org/base"]
    assert command(text, "vllm")[:3] == ["vllm", "serve", "org/base"]
    assert command(text, "vllm")[3:] == [
        "--enable-lora", "--enforce-eager", "--max-lora-rank", "8", "--lora-modules", "dates=ana/dates",
    ]  # fmt: skip
    assert f"vllm=={TESTED_VERSIONS[-1]}" in text
    assert "the vLLM command needs minilora_hub beside vLLM" in text
    assert "do not load mixtures of LoRA experts." in text
    assert "minilora export DIR --to moe" in text
    assert "Inference Endpoint" not in text


def test_the_servers_arguments_are_those_of_the_command(tmp_path, monkeypatch):
    """The command of the card, and the one inside the job, reach the server as they are meant."""
    from typer.testing import CliRunner

    import minilora_hub.serving.run as run
    from minilora_hub.cli import app

    class StopHereError(Exception):
        pass

    asked = []

    def build_server(base, adapters, **arguments):
        asked.append((base, adapters))
        raise StopHereError

    monkeypatch.setattr(run, "build_server", build_server)
    # Which looks the adapter up on the Hub, to read the base that it names.
    monkeypatch.setattr("minilora_hub.compare.found_adapters.base_for", lambda base, adapters, progress: base)
    text = section(tmp_path)
    inside = command(text, "hf", "jobs")[-1]
    assert inside.startswith("pip install 'minilora_hub[serve]' && ")
    for words in (command(text, "minilora"), shlex.split(inside.rpartition("&& ")[2])):
        done = CliRunner().invoke(app.app, [*words[1:], "--port", str(free_port())])
        assert isinstance(done.exception, StopHereError), done.output
    assert asked == [("org/base", ["ana/dates"])] * 2


def test_the_job_is_one_that_hf_accepts(tmp_path):
    """`hf jobs run` parses it, and shows what it would send."""
    words = command(section(tmp_path), "hf", "jobs", "run")
    done = subprocess.run(
        [sys.executable, "-m", "huggingface_hub.cli.hf", "jobs", "run", "--dry-run", *words[3:]],
        env=os.environ | {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout
    for expected in (r"image\s+python:3.12", r"flavor\s+l4x1", r"expose\s+8000", r"minilora serve ana/dates"):
        assert re.search(expected, done.stdout), expected


@pytest.mark.parametrize(
    ("changes", "served", "button", "export"),
    [
        ({"routing_strategy": "top_p"}, ["org/base", "--enable-lora"], False, None),
        ({"use_dora": True}, ["ana/dates"], True, "moe"),
        ({"use_dora": True, "routing_strategy": "top_p"}, None, False, None),
        ({"text_config": {"model_type": "gemma2"}}, None, False, None),
        ({"text_config": {"model_type": "olmo2"}}, ["ana/dates"], True, "moe"),
        ({"text_config": {"model_type": "llama"}, "expert_r": 40}, ["org/base", "--max-lora-rank", "64"], True, "moe"),
    ],
)
def test_what_vllm_cannot_serve_is_not_promised(tmp_path, changes, served, button, export):
    config = {name: value for name, value in (CONFIG | changes).items() if name != "num_experts_per_tok"}
    text = section(tmp_path, config=config)
    assert (served is None) == (not [words for words in commands(text) if words[0] == "vllm"])
    if served is not None:
        assert set(served) <= set(command(text, "vllm"))
    assert ("the vLLM command needs minilora_hub" in text) == button
    assert ("the vLLM command does not work" in text) == (not button)
    assert (f"--to {export} " in text) == (export is not None)
    assert "minilora export" not in text or export is not None


def test_a_dora_a_lora_and_a_folder(tmp_path):
    text = section(tmp_path / "dora", "dora")
    assert command(text, "vllm")[5:7] == ["--max-lora-rank", "16"]
    assert "do not load DoRA. `minilora export DIR --to dense" in text

    folder = card_folder(tmp_path / "lora", minimal_results("lora"), {"r": 8})
    (folder / "config.json").rename(folder / "adapter_config.json")
    for path in folder.glob("*.py"):
        path.unlink()
    for name, path in endpoint_files(True).items():
        (folder / name).write_bytes(path.read_bytes())
    card = render_card(folder, repo_id="ana/plain-lora")
    assert "--enforce-eager" not in card
    assert "pip install vllm\n" in card
    assert "do not work: engines load a LoRA beside its base" in card
    assert "can be deployed as an Inference Endpoint" in card
    assert "Loading runs no code of this repo." in card

    text = section(tmp_path / "folder", "dora", repo_id=None)
    assert "hf jobs" not in text
    assert command(text, "minilora")[2] == "./card"
