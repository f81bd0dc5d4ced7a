"""Adapters at run time on tiny bases of other families, on two ranks, and in a compiled model."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/vllm makes an environment that has it")

from engines.vllm.answers_here import greedy
from engines.vllm.tiny_adapters import save_tiny
from engines.vllm.vllm_processes import answers_of_model
from tiny import token_ids
from transformers import AutoModelForCausalLM

SETTINGS = {"skip_tokenizer_init": True, "enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
COUNT = 4  # of random weights; later tokens may depend on two logits that are nearly equal

pytestmark = pytest.mark.slow


def check(tmp_path, family: str, *methods: str, **settings) -> None:
    """Compare one batch, with rows of the base and of each adapter, with what transformers answers."""
    models = save_tiny(tmp_path, family, *methods)
    models["base"] = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = [(name, ids) for ids in token_ids(3, 9).tolist() for name in ("base", *methods)]
    folders = [None if name == "base" else tmp_path / name for name, _ in rows]
    prompts = [ids for _, ids in rows]
    found = answers_of_model(tmp_path / "base", prompts, COUNT, tmp_path, folders, **SETTINGS | settings)
    expected = [greedy(models[name], ids, COUNT) for name, ids in rows]
    assert found == expected, found
    assert len({tuple(answer) for answer in expected[: len(methods) + 1]}) == len(methods) + 1, "the adapters are alike"


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "granite"])
def test_dora_and_mixlora(tmp_path, family):
    check(tmp_path, family, "dora", "mixlora")


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_dora(tmp_path, family):
    check(tmp_path, family, "dora")


def test_dora_on_two_ranks(tmp_path):
    """Magnitudes are cut as the rows of B are, and the norms of row-parallel layers are summed over the ranks."""
    check(tmp_path, "qwen2", "dora", tensor_parallel_size=2)


def test_dora_in_a_compiled_model(tmp_path):
    check(tmp_path, "llama", "dora", enforce_eager=False)


def test_mixlora_is_refused_in_a_compiled_model(tmp_path):
    save_tiny(tmp_path, "llama", "mixlora")
    prompts, settings = token_ids(1, 9).tolist(), SETTINGS | {"enforce_eager": False}
    found = answers_of_model(tmp_path / "base", prompts, 1, tmp_path, [tmp_path / "mixlora"], **settings)
    assert isinstance(found, str)
    assert "needs a server that was started with --enforce-eager" in found
