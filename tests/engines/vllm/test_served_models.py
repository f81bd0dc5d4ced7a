"""`vllm serve ADAPTER`: a published DoRA, MixLoRA or MixDoRA as a model, its base loaded by vLLM."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/vllm makes an environment that has it")

from engines.vllm.answers_here import NEW_TOKENS, answers, folder_of, prompts
from engines.vllm.vllm_processes import answers_of_model
from safetensors.torch import load_file, save_file

EMBEDDED = {"hf_overrides": {"base_model_name_or_path": "embedded"}}


@pytest.mark.parametrize("method", ["dora", "mixlora", "mixdora"])
def test_the_shipped_adapters(tmp_path, method):
    """In float32, on the embedded base, which the published configuration names by its id on the Hub."""
    found = answers_of_model(folder_of(method), prompts(), NEW_TOKENS, tmp_path, **EMBEDDED)
    assert found == answers(method), found


def test_a_damaged_adapter_is_refused_by_name(tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(folder_of("dora"), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop("layers.7.mlp.up_proj.lora_B")
    save_file(tensors, folder / "adapter_model.safetensors")
    found = answers_of_model(folder, prompts()[:1], 1, tmp_path, **EMBEDDED)
    assert isinstance(found, str)
    assert "missing layers.7.mlp.up_proj.lora_B" in found
