"""Adapters at run time on tiny bases of other families, with other routings, and on two ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

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
    """Compare tiny adapters of a family; see `compare`."""
    models = save_tiny(tmp_path, family, *methods)
    compare(tmp_path, {method: (tmp_path / method, models[method]) for method in methods}, **settings)


def compare(tmp_path, adapters: dict[str, tuple[Path, Any]], **settings) -> None:
    """Compare one batch, with rows of the base and of each adapter, with what transformers answers."""
    models = {"base": AutoModelForCausalLM.from_pretrained(tmp_path / "base")}
    models |= {name: model for name, (_, model) in adapters.items()}
    rows = [(name, ids) for ids in token_ids(3, 9).tolist() for name in models]
    folders = [adapters[name][0] if name in adapters else None for name, _ in rows]
    prompts = [ids for _, ids in rows]
    found = answers_of_model(tmp_path / "base", prompts, COUNT, tmp_path, folders, **SETTINGS | settings)
    expected = [greedy(models[name], ids, COUNT) for name, ids in rows]
    assert found == expected, found
    assert len({tuple(answer) for answer in expected[: len(models)]}) == len(models), "the adapters are alike"


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "granite"])
def test_dora_and_mixlora(tmp_path, family):
    check(tmp_path, family, "dora", "mixlora")


def test_other_routings(tmp_path):
    adapters = {}
    for strategy in ("top_p", "switch", "arrow"):
        model = save_tiny(tmp_path / strategy, "llama", "mixlora", routing_strategy=strategy)["mixlora"]
        adapters[strategy] = (tmp_path / strategy / "mixlora", model)
    shutil.copytree(tmp_path / "arrow" / "base", tmp_path / "base")
    compare(tmp_path, adapters, max_loras=3)


def test_dora_on_fused_linears(tmp_path):
    """Phi-3's own qkv_proj and gate_up_proj."""
    check(tmp_path, "phi3", "dora")


def test_dora_on_two_ranks(tmp_path):
    """Magnitudes are cut as the rows of B are, and the norms of row-parallel layers are summed over the ranks."""
    check(tmp_path, "qwen2", "dora", tensor_parallel_size=2)


def test_without_enforce_eager(tmp_path):
    """On a CPU, vLLM compiles no model that takes adapters."""
    check(tmp_path, "llama", "dora", "mixlora", enforce_eager=False)
