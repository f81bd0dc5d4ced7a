"""Choose the commands by which a card says how to serve an adapter. Torch and vLLM are not needed."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from minilora_hub.adapter_folder.folders import only_ours
from minilora_hub.formats.moe_architectures import ARCHITECTURES
from minilora_hub.hub.client import REPO_ID
from minilora_hub.integrations.vllm.plugin import TESTED_VERSIONS

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for --max-lora-rank."""
RUNTIME_MIXTURES = ("llama", "mistral", "qwen2", "qwen3", "granite")
"""Families of bases on which vLLM serves a MixLoRA beside other adapters, see docs/vllm.md."""


@dataclass(frozen=True)
class Serving:
    """What a card says about serving.

    Attributes:
        server: the commands of `minilora serve`.
        job: the same as a job on the Hub's machines; None where the adapter is not on the Hub.
        vllm: the commands for vLLM; None where it cannot serve the adapter.
        vllm_alone: whether vLLM can take the repo for a model, with minilora_hub beside vLLM.
        export: the target of `minilora export` that other engines read; None where there is none.
    """

    server: str
    job: str | None
    vllm: str | None
    vllm_alone: bool
    export: str | None


def serving(method: str, config: dict[str, Any], base: str, name: str, repo_id: str | None, stock: bool) -> Serving:
    """Return the commands for an adapter.

    Args:
        method: ``"mixlora"``, ``"dora"`` or ``"lora"``.
        config: its config.json or adapter_config.json.
        base: its base.
        name: its repo or folder, as the commands name it.
        repo_id: its repo, None where it is in none.
        stock: whether it is in PEFT's layout.
    """
    family = (config.get("text_config") or {}).get("model_type")
    command = f"minilora serve {shlex.quote(name)} --base {shlex.quote(base)}"
    install = "pip install 'minilora_hub[serve]'"
    job = None
    if repo_id is not None:
        inner = f"{install} && {command} --host 0.0.0.0"
        quoted = shlex.quote(inner) if set(inner) & set('"$`\\!') else f'"{inner}"'
        options = "--flavor l4x1 --timeout 1h --expose 8000 --secrets HF_TOKEN"
        job = f"hf jobs run {options} \\\n  python:3.12 bash -c {quoted}"
    routed, on_experts = method == "mixlora", bool(config.get("target_parameters"))
    elsewhere = only_ours(config) is None
    as_moe = routed and elsewhere and config.get("routing_strategy") == "top_k" and family in (None, *ARCHITECTURES)
    alone = not stock and (method == "dora" or as_moe) and bool(REPO_ID.fullmatch(base)) and not on_experts
    beside = not routed or (not config.get("use_dora") and family in (None, *RUNTIME_MIXTURES))
    beside = beside and not on_experts and elsewhere
    needed = "pip install vllm" if method == "lora" else f"pip install vllm=={TESTED_VERSIONS[-1]} minilora_hub"
    vllm = None
    if beside:
        eager = "" if method == "lora" else " --enforce-eager"
        module = shlex.quote(f"{name.rpartition('/')[2]}={name}")
        vllm = (
            f"{needed}\nvllm serve {shlex.quote(base)} --enable-lora{eager} --max-lora-rank {_max_rank(config)} \\\n"
            f"  --lora-modules {module}"
        )
    elif alone:
        vllm = f"{needed}\nvllm serve {shlex.quote(name)}"
    export = "moe" if as_moe else None if routed else "dense"
    return Serving(f"{install}\n{command}", job, vllm, alone, export)


def _max_rank(config: dict[str, Any]) -> int:
    """Return the smallest value of --max-lora-rank that an adapter fits in."""
    patterns = config.get("rank_pattern") or {}
    ranks = [config.get("r"), config.get("expert_r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    rank = max((rank for rank in ranks if isinstance(rank, int)), default=LORA_RANKS[0])
    return next((allowed for allowed in LORA_RANKS if allowed >= rank), rank)
