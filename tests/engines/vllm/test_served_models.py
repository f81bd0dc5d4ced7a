"""`vllm serve ADAPTER`: a published DoRA, MixLoRA or MixDoRA as a model, its base loaded by vLLM."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/vllm makes an environment that has it")

from engines.vllm.answers_here import NEW_TOKENS, TEXTS, answers, folder_of, greedy, prompts
from engines.vllm.tiny_adapters import save_tiny
from engines.vllm.vllm_processes import Server, answers_of_model
from safetensors.torch import load_file, save_file
from tiny import token_ids

from minilora_hub.formats.moe_architectures import ARCHITECTURES

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


def test_a_server_answers_chat_requests_with_the_adapter(tmp_path):
    """The published MixLoRA behind vLLM's OpenAI API, with the chat template of its folder."""
    overrides = ("--hf-overrides", json.dumps(EMBEDDED["hf_overrides"]), "--served-model-name", "mixture")
    server = Server(str(folder_of("mixlora")), tmp_path / "log.txt", *overrides)
    try:
        answer = server.chat("mixture", TEXTS[0], NEW_TOKENS)
    finally:
        server.stop()
    assert answer == (200, answers("mixlora")[0])


CASES = [("dora", family) for family in ("mistral", "qwen2", "qwen3", "phi3", "olmo2", "granite")]
CASES += [("mixlora", family) for family in ARCHITECTURES if family != "olmo2"]


def check(tmp_path, family, method, **settings):
    """Random weights: only the first tokens, since later ones may depend on two logits that are nearly equal."""
    model = save_tiny(tmp_path, family, method)[method]
    ids = token_ids(2, 9).tolist()
    found = answers_of_model(tmp_path / method, ids, 4, tmp_path, skip_tokenizer_init=True, **settings)
    assert found == [greedy(model, prompt, 4) for prompt in ids], found


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family"), CASES)
def test_families(tmp_path, family, method):
    check(tmp_path, family, method)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"tensor_parallel_size": 2}, {"enforce_eager": False}], ids=["ranks", "compiled"])
def test_on_two_ranks_and_compiled(tmp_path, settings):
    check(tmp_path, "llama", "mixlora", **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("phi3", {}, "base of type 'phi3': PhiMoE"),
        ("olmo2", {}, "base of type 'olmo2': FlexOlmo crashes"),
        ("llama", {"routing_strategy": "top_p"}, "routing_strategy"),
    ],
    ids=["family without a mixture of experts", "family whose mixture crashes", "top-p routing"],
)
def test_a_mixture_that_no_architecture_computes_is_refused_by_name(tmp_path, family, changes, message):
    save_tiny(tmp_path, family, "mixlora", **changes)
    found = answers_of_model(tmp_path / "mixlora", token_ids(1, 9).tolist(), 1, tmp_path, skip_tokenizer_init=True)
    assert isinstance(found, str)
    assert message in found
