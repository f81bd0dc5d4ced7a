"""One attack on every way in: an adapter with our released files whose configuration leads to the code of another repo.

That repo is on the Hub, and its code would leave a file behind. Nothing may ever ask for it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import main

from minilora_hub.adapter_folder.verification import Verification, is_hashed
from minilora_hub.bases import resolve_base
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.demo.adapters.catalogue import Catalogue
from minilora_hub.demo.adapters.from_hub import LinkedAdapters
from minilora_hub.demo.runs.runner import Runner
from minilora_hub.demo.runs.visitor import Visitors
from minilora_hub.demo.ui.adapter_picker import picker_value
from minilora_hub.demo.votes.sharing import SharedComparisons
from minilora_hub.demo.votes.votes import VoteStore
from minilora_hub.errors import AdapterError
from minilora_hub.publish.find import info
from minilora_hub.publish.push.build import list_files
from minilora_hub.publish.verify.verify import verify

OTHER = "someone/else"
ATTACKS = {
    "config.json": {"auto_map": {"AutoConfig": f"{OTHER}--evil.X", "AutoModelForCausalLM": f"{OTHER}--evil.X"}},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [f"{OTHER}--evil.X", None]}},
    "generation_config.json": {"custom_generate": OTHER},
    "custom_generate/": None,
}


@pytest.fixture
def marker(hub, tmp_path):
    """Publish the other repo; return the file that its code writes. Nobody has asked for the repo at the end."""
    marker = tmp_path / "it ran"
    code = f"open({str(marker)!r}, 'w').close()\nclass X: ...\n".encode()
    hub.add_repo(OTHER, files={"evil.py": code, "config.json": b"{}", "custom_generate/generate.py": code})
    yield marker
    assert not marker.exists()
    assert [record.path for record in hub.requests if OTHER in record.path] == []


@pytest.fixture(params=ATTACKS)
def attacked(request, hub, good, tmp_path, marker):
    """Return the file that leads elsewhere, and an attacked DoRA and LoRA, in folders and on the Hub as ana/METHOD."""
    folders = {}
    for method in ("dora", "lora"):
        folder = folders[method] = Path(shutil.copytree(good[method], tmp_path / method))
        if request.param == "custom_generate/":
            (folder / "custom_generate").mkdir()
            (folder / "custom_generate" / "generate.py").write_text(f"open({str(marker)!r}, 'w').close()")
        else:
            path = folder / request.param
            content = json.loads(path.read_text()) if path.is_file() else {"model_type": "dora"}
            before = content.get("auto_map", {})
            content |= ATTACKS[request.param]
            if "auto_map" in content:
                content["auto_map"] = before | content["auto_map"]
            path.write_text(json.dumps(content))
        hashes = {file.path: file.sha256 for file in list_files(folder) if is_hashed(file.path)}
        dataclasses.replace(Verification.load(folder), sha256=hashes).save(folder)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        hub.add_repo(f"ana/{method}", files={name: path.read_bytes() for name, path in files.items()})
    return request.param, folders


def test_verify_runs_nothing(attacked, base_folder):
    """By its hash the code is a release of ours, and verification.json holds the attacked files' own hashes."""
    file, folders = attacked
    for name in ("ana/dora", folders["dora"], "ana/lora"):
        report = verify(name, base_model=str(base_folder), progress=False)
        assert report.problem.startswith(f"code: {file}"), report.problem
        assert report.problem.endswith(": nothing was run")
        assert [step.name for step in report.steps if not step.ok] == ["code"]
        trusted = verify(name, base_model=str(base_folder), progress=False, trust_remote_code=True)
        assert trusted.problem == report.problem


def test_info_and_pull_warn(attacked, capsys, tmp_path):
    file, folders = attacked
    for name in ("ana/dora", folders["lora"]):
        (warning, *_) = info(name, progress=False).warnings
        assert warning.startswith(f"{file}: ")
    code, told = main(capsys, "info", "ana/lora")
    assert code == 0
    assert f"{file}: " in told.out
    code, told = main(capsys, "pull", "ana/dora", "--out", tmp_path / "pulled")
    assert code == 0
    assert f"warning: {file}: " in told.err
    assert (tmp_path / "pulled" / "adapter_model.safetensors").is_file()


COMMANDS = (
    ("compare", "ana/dora", "--prompt", "Hi"),
    ("compare", "lora", "--prompt", "Hi"),
    ("eval", "ana/dora", "--task", "dates", "--count", "1"),
    ("import", "lora", "--out", "made"),
    ("import", "lora", "lora", "--out", "made"),
    ("export", "dora", "--to", "peft", "--out", "made"),
    ("export", "lora", "--to", "dense", "--out", "made"),
    ("combine", "lora", "lora", "--method", "linear", "--out", "made"),
    ("push", "dora", "ana/new", "--dry-run"),
    ("push", "lora", "ana/new", "--dry-run"),
)


def test_every_other_command_refuses_it_in_one_line(attacked, capsys, monkeypatch, tmp_path, base_folder):
    file, _ = attacked
    monkeypatch.chdir(tmp_path)
    for arguments in COMMANDS:
        code, told = main(capsys, *arguments, "--base", base_folder)
        line = told.err.strip().splitlines()[-1]
        assert code == 1, arguments
        assert line.startswith(f"minilora: adapter {arguments[1]!r} is not loaded: {file}: "), arguments
        assert not Path("made").exists()


def test_a_space_is_not_deployed_over_it(attacked, capsys):
    file, _ = attacked
    code, told = main(capsys, "space", "push", "ana/space", "ana/dora", "--dry-run")
    assert code == 1
    assert f"ana/dora cannot be shown: {file}: " in told.err


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_the_page_refuses_it_from_a_link_and_in_the_picker(attacked, hub, base_folder, tmp_path, method):
    """From the Hub before its weights are fetched; in a folder that visitors may choose from, when it is chosen."""
    file, folders = attacked
    allowed = tmp_path / "allowed"
    shutil.copytree(folders[method], allowed / "mine")
    engine = CompareEngine(str(base_folder), device="cpu")
    links = LinkedAdapters(engine, resolve_base("org/base"))
    runner = Runner(engine, Catalogue(engine, links, [allowed]))
    visitor = Visitors(runner, VoteStore(tmp_path / "votes"), SharedComparisons(tmp_path / "shared")).of("ana")

    def run(coroutine):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, coroutine).result()

    with pytest.raises(AdapterError) as refused:
        run(visitor.choose([f"ana/{method}"]))
    assert str(refused.value).startswith(f"ana/{method} is not loaded: {file}: ")
    assert not [one for one in hub.requests if f"ana/{method}/" in one.path and one.path.endswith(".safetensors")]
    assert "custom_generate" not in {one.path.split("/")[-2] for one in hub.requests if "/resolve/" in one.path}
    with pytest.raises(AdapterError, match=f"is not loaded: {file}: "):
        run(visitor.choose(["mine"]))
    (card,) = picker_value(runner, [])["cards"]
    assert file in card["facts"][0]
    assert [column.kind for column in visitor.columns()] == ["base"]


@pytest.mark.slow
def test_the_snippet_without_trust_loads_an_adapter(hub, good, tmp_path):
    """docs/load.md: model and tokenizer, with the installed classes, and none of the repo's code."""
    page = (Path(__file__).parents[2] / "docs" / "load.md").read_text(encoding="utf-8")
    _, snippet, *_ = re.findall(r"```python\n(.*?)```", page, re.S)
    files = {path.name: path.read_bytes() for path in good["mixlora"].iterdir() if path.is_file()}
    hub.add_repo("user/adapter", files=files)
    script = f"""
{snippet}
import sys
assert type(model) is minilora_hub.MixLoraForCausalLM
assert tokenizer("Hello")["input_ids"]
assert not [name for name in sys.modules if name.startswith("transformers_modules")]
"""
    environment = os.environ | hub.environment(cache_dir=tmp_path / "hf")
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
