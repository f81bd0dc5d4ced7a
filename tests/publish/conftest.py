"""An adapter in a folder and a Hub that has its base: what most tests of publishing start from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import huggingface_hub
import pytest
import tiny_stand_ins
import torch
from hub.server import HubServer
from tiny import fill_adapter

from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
from minilora_hub.adapter_folder.results import Base, Evaluation, Results, Training

if TYPE_CHECKING:
    from minilora_hub.publish.verify.isolated_process import IsolatedProcess

BASE_ID = "org/base"


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on two busy cores than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """Return a tiny base with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_stand_ins.tiny_llama().save_pretrained(folder)
    tiny_stand_ins.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained(base_folder: Path) -> dict[str, Path]:
    """Return folders as `save_pretrained` and a measurement leave them: a DoRA, a MixLoRA and a plain LoRA."""
    from peft import LoraConfig, get_peft_model

    made = {
        "dora": DoraForCausalLM.from_base(str(base_folder), DoraConfig(r=4)),
        "mixlora": MixLoraForCausalLM.from_base(str(base_folder), MixLoraConfig(r=4, num_experts=4)),
    }
    folders = {name: base_folder.parent / name for name in (*made, "lora")}
    for name, model in made.items():
        fill_adapter(model)
        model.config.base_model_name_or_path = BASE_ID
        model.save_pretrained(folders[name], tokenizer=tiny_stand_ins.byte_tokenizer())
    lora = get_peft_model(tiny_stand_ins.tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.2)
    lora.peft_config["default"].base_model_name_or_path = BASE_ID
    lora.save_pretrained(folders["lora"], save_embedding_layers=False)
    (folders["lora"] / "README.md").unlink()
    for method, folder in folders.items():
        evaluation = Evaluation("dates", "exact match", 0.9, base_value=0.1, n=150)
        training = Training(steps=200, seconds=12.5, loss=((10, 2.0), (20, 1.5)))
        base = Base(BASE_ID, license="apache-2.0")
        Results(method, base, license="apache-2.0", language=("en",), training=training, evaluation=(evaluation,)).save(
            folder
        )
    return folders


@pytest.fixture(scope="session")
def good(trained: dict[str, Path], base_folder: Path) -> dict[str, Path]:
    """Return the same adapters as they are published."""
    from minilora_hub.publish.push.build import build

    built = {}
    for method, folder in trained.items():
        out = folder.with_name(f"{method}-published")
        built[method] = build(folder, out, repo_id=f"ana/{method}", base_model=str(base_folder)).folder
    return built


@pytest.fixture(scope="session")
def process() -> Iterator[IsolatedProcess]:
    """Verify in one process, which starts again only for other code."""
    from minilora_hub.publish.verify.isolated_process import IsolatedProcess

    with IsolatedProcess() as started:
        yield started


@pytest.fixture
def copy_of(tmp_path: Path, trained: dict[str, Path]):
    """Return a function that copies a trained folder, for a test to change."""

    def copied(method: str = "dora") -> Path:
        return Path(shutil.copytree(trained[method], tmp_path / f"my-{method}"))

    return copied


@pytest.fixture
def hub(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Serve a Hub with the base to the client in this process and in those it starts; nobody waits between retries."""
    impatient = SimpleNamespace(sleep=lambda seconds: None, time=lambda: 0.0, perf_counter=lambda: 0.0)
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download", "minilora_hub.hub.errors"):
        monkeypatch.setattr(f"{module}.time", impatient)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with HubServer(lfs_threshold=10_000) as server:
        for name, value in server.environment(cache_dir=tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        server.use_in_process(monkeypatch, tmp_path / "hf")
        files = {path.name: path.read_bytes() for path in base_folder.iterdir()}
        card = json.dumps({"license": "apache-2.0"})
        server.add_repo(BASE_ID, files={**files, "README.md": f"---\n{card}\n---\nA base.\n".encode()})
        yield server
    huggingface_hub.close_session()
