"""Through a link, an adapter is prompted with the base's chat template; its column says so where it brings another."""

from __future__ import annotations

import json
import shutil
import subprocess
from types import SimpleNamespace

import huggingface_hub
import pytest
from tiny_stand_ins import CHAT

from minilora_hub.bases import ResolvedBase
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.demo.adapters.from_hub import LinkedAdapters


@pytest.mark.parametrize(
    ("template", "said"),
    [(None, ""), (CHAT, ""), ("{{ messages[0].content }}", ", with the base's chat template, not its own")],
)
def test_a_column_says_whose_template_it_has(template, said, saved, tmp_path, monkeypatch):
    base, adapters = saved
    repo = tmp_path / "repo"
    shutil.copytree(adapters[2], repo)
    config = json.loads((repo / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/base"}
    (repo / "adapter_config.json").write_text(json.dumps(config))
    if template is not None:
        (repo / "chat_template.jinja").write_text(template)

    class Hub:
        def __init__(self, token):
            assert token is False

        def model_info(self, name, files_metadata):
            def oid(path):
                return subprocess.check_output(["git", "hash-object", path], text=True).strip()

            files = [path for path in repo.iterdir() if path.is_file()]
            siblings = [
                SimpleNamespace(rfilename=path.name, size=path.stat().st_size, blob_id=oid(path)) for path in files
            ]
            return SimpleNamespace(siblings=siblings, sha="0" * 40)

        def hf_hub_download(self, name, file, revision, local_dir):
            shutil.copyfile(repo / file, local_dir / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    engine = CompareEngine(base, device="cpu")
    links = LinkedAdapters(engine, ResolvedBase("org/base", base, "org/base", None, False))
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    repo = links.fetch("ana/lora", fetched)
    column = links.load("ana/lora", fetched, repo)
    assert column.detail == f"rank 4{said}"
    assert engine.prompt_ids("hi", "ana/lora") == engine.prompt_ids("hi")
