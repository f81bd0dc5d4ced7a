"""Check the name, settings, size and template of a linked adapter before its weights are downloaded. No Gradio.

Links are untrusted input, so these checks are stricter than those of the `minilora` commands.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from minilora_hub.adapter_folder.names import TEMPLATE
from minilora_hub.errors import AdapterError
from minilora_hub.remote_code.base_structure import matches_target

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
PLAIN_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)

# Settings of plain LoRA and DoRA in PEFT. Other settings import modules, copy layers or rewrite the base's own weights.
PEFT_SETTINGS = {
    "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias",
    "use_rslora", "use_dora", "init_lora_weights",
}  # fmt: skip
PEFT_INERT = {"megatron_core", "qalora_group_size"}
"""Settings that PEFT writes into every file, and that have no effect without another setting."""

VALUE_BYTES = 8
"""Bytes of a value in float64, the widest dtype."""
HEADER_BYTES, ENTRY_BYTES = 2**20, 512
"""Upper bounds of a safetensors file, in bytes: its metadata, and the header's entry for one tensor."""


def check_name(name: str) -> None:
    """Check that a name is an id on the Hub, and not, for example, a path on this server.

    Raises:
        AdapterError: it is not an id.
    """
    if not REPO_ID.fullmatch(name) or ".." in name or "--" in name or name.endswith((".git", ".", "-")):
        raise AdapterError(f"{name[:60]!r} is not an id on the Hub: must be owner/name")


def check_settings(config: dict[str, Any], *, peft: bool) -> None:
    """Check that no setting can exhaust the server or affect more than the adapter's own tensors.

    Raises:
        AdapterError: a setting can.
    """
    if config.get("target_parameters"):
        raise AdapterError("target_parameters: a page does not load adapters on stacked experts")
    for field in ("rank_pattern", "alpha_pattern"):
        # Their keys are regular expressions, whose matching time is unbounded.
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict) or not all(PLAIN_NAME.fullmatch(str(key)) for key in patterns):
            raise AdapterError(f"{field}: a page reads plain names of modules only")
    if not peft:
        return
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(PLAIN_NAME.fullmatch(str(target)) for target in targets):
        raise AdapterError("target_modules: a page reads a list of plain names of modules only")
    start, bias = config.get("init_lora_weights"), config.get("bias")
    if start not in (None, True, False, "gaussian") or bias not in (None, "none"):
        raise AdapterError("init_lora_weights or bias changes the base's own weights: a page does not load that")
    for name, value in config.items():
        if value and name not in PEFT_SETTINGS | PEFT_INERT:
            raise AdapterError(f"{name[:60]} is set in adapter_config.json: a page loads plain LoRA and DoRA only")


def most_bytes(config: Mapping[str, Any], linears: Mapping[str, tuple[int, int]]) -> int:
    """Return an upper bound of the bytes of an adapter's weights: every linear with all experts and a router.

    Args:
        config: content of config.json or adapter_config.json.
        linears: {path: (out_features, in_features)} of the base.

    Raises:
        AdapterError: a rank or the number of experts is not a whole number above 0, or the base has no target.
    """
    ranks = [("r", config.get("r", 16)), ("expert_r", config.get("expert_r") or 1)]
    ranks += [("rank_pattern", rank) for rank in (config.get("rank_pattern") or {}).values()]
    experts = config.get("num_experts", 8) if config.get("model_type") == "mixlora" else 1
    counts = experts if isinstance(experts, list) and experts else [experts]
    for name, value in (*ranks, *(("num_experts", count) for count in counts)):
        if type(value) is not int or value < 1:
            raise AdapterError(f"{name}={str(value)[:40]!r}: must be a whole number above 0")
    targets = config.get("target_modules", "all-linear")
    if targets != "all-linear" and not (isinstance(targets, list) and all(isinstance(one, str) for one in targets)):
        raise AdapterError(f"target_modules={str(targets)[:80]!r}: must be 'all-linear' or a list of names")
    adapted = [shape for path, shape in linears.items() if matches_target(path, targets)]
    if not adapted:
        raise AdapterError(f"target_modules={str(targets)[:80]}: the base of this page has no such linear")
    rank = max(value for _, value in ranks)
    values = sum(max(counts) * (rank * (outputs + inputs) + outputs + inputs) for outputs, inputs in adapted)
    return VALUE_BYTES * values + HEADER_BYTES + 4 * ENTRY_BYTES * len(adapted)


def has_other_template(blobs: Mapping[str, str | None], tokenizer: Any) -> bool:
    """Return whether a repo has a chat template that differs from the base's; a page runs only the base's.

    Args:
        blobs: ``{file: git's hash of its content}`` of the repo.
        tokenizer: the base's.
    """
    text = str(tokenizer.chat_template or "").encode()
    return blobs.get(TEMPLATE) not in (None, hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest())  # noqa: S324
