"""File names of an adapter folder, and translation of tensor names between all supported formats.

    canonical     layers.3.self_attn.q_proj.lora_A                                   our files
    PEFT          base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight     PEFT's LoRA and DoRA; the base's
                                                                                     own path to its layers is inside
    PEFT MixLoRA  base_model.model.model.layers.3.mlp.moe_lora.router                MixLoRA as a PEFT method; experts
                  …layers.3.mlp.moe_lora.experts.up_proj.lora_A                      stacked, as in our files
                  …layers.3.self_attn.q_proj.moe_lora.update.lora_A
    reference     mixlora.layers.3.self_attn.q_proj.lora_A.weight                    files of `mixlora` and MoE-PEFT:
                  mixlora.layers.3.mlp.up_proj.experts.0.lora_A.weight               one tensor for each expert
                  mixlora.layers.3.mlp.moe_gate.weight                               the router
    legacy        mixlora.layers.3.experts.0.w3_proj.lora_A.weight                   older files of the reference
                  mixlora.layers.3.gate.weight                                       (w1 gate, w2 down, w3 up)

A DoRA magnitude is ``magnitude`` here and ``lora_magnitude_vector`` in PEFT. PEFT writes that name without ``.weight``
and reads both spellings. transformers' own loader of PEFT's format (5.23) finds it only with ``.weight``; otherwise it
initialises a new magnitude and only logs that. So we write it with ``.weight``. Nothing here loads torch.
"""

from __future__ import annotations

import re

# ---- files ----

OUR_CONFIG, PEFT_CONFIG = "config.json", "adapter_config.json"
WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
WEIGHTS_INDEX = WEIGHTS + ".index.json"
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TOKENIZING = (
    *TOKENIZER_FILES,
    TEMPLATE,
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""Files that transformers reads a tokenizer from."""
PROCESSING = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files that transformers reads the processor of images and sounds from."""
COMPANIONS = (*TOKENIZING, GENERATION)
"""Files beside the weights that are copied with an adapter. Other files of a training run are not."""

EDITED_ON_THE_HUB = (
    "README.md",
    ".gitattributes",
    ".eval_results/*.yaml",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
)
"""Files, as patterns, that people write on the Hub: nothing loads them, and verification.json has no hash of them."""

# ---- tensors of PEFT's LoRA and DoRA ----

PEFT_PREFIX = "base_model.model."
CANONICAL_LAYERS = "layers"
PEFT_LEAVES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}
CANONICAL_LEAVES = {leaf: name for name, leaf in PEFT_LEAVES.items()} | {"lora_magnitude_vector": "magnitude"}


def split_peft(name: str) -> tuple[str, str]:
    """Split a PEFT name into the path of the linear in the base, and ``lora_A``, ``lora_B`` or ``magnitude``.

    Raises:
        ValueError: the name is not that of a LoRA or DoRA tensor on a linear.
    """
    for leaf, canonical in CANONICAL_LEAVES.items():
        if name.startswith(PEFT_PREFIX) and name.endswith(f".{leaf}"):
            return name.removeprefix(PEFT_PREFIX).removesuffix(f".{leaf}"), canonical
    raise ValueError(f"name={name!r}: not a LoRA or DoRA tensor on a linear in PEFT's format")


def join_peft(path: str, leaf: str) -> str:
    """Return PEFT's name of a tensor: the inverse of `split_peft`."""
    return f"{PEFT_PREFIX}{path}.{PEFT_LEAVES[leaf]}"


def from_peft(name: str, layers_path: str) -> str:
    """Translate a PEFT name to the canonical one.

    Args:
        name: e.g. ``"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"``.
        layers_path: where the base keeps its decoder layers, e.g. ``"model.layers"`` or ``"transformer.h"``.

    Raises:
        ValueError: the name is not PEFT's, or lies outside the decoder layers.
    """
    path, leaf = split_peft(name)
    if not path.startswith(f"{layers_path}."):
        raise ValueError(f"name={name!r}: not under {PEFT_PREFIX}{layers_path}, where the base has its layers")
    return f"{CANONICAL_LAYERS}.{path.removeprefix(f'{layers_path}.')}.{leaf}"


def to_peft(name: str, layers_path: str) -> str:
    """Translate a canonical name to PEFT's: the inverse of `from_peft`.

    Raises:
        ValueError: PEFT has no such tensor (a router, stacked experts), or the name is not canonical.
    """
    module, _, leaf = name.rpartition(".")
    layers, _, path = module.partition(".")
    if layers != CANONICAL_LAYERS or leaf not in PEFT_LEAVES or ".experts." in f".{path}.":
        raise ValueError(f"name={name!r}: PEFT's LoRA format has no tensor for it")
    return join_peft(f"{layers_path}.{path}", leaf)


def as_stock_transformers_reads(name: str) -> str:
    """Return a name of PEFT's format in the spelling that both PEFT and transformers load."""
    return f"{name}.weight" if name.endswith(".lora_magnitude_vector") else name


def is_update(name: str) -> bool:
    """Whether a tensor in PEFT's format belongs to a LoRA or DoRA; otherwise it is a copy of the base's own."""
    return any(name.endswith(f".{leaf}") for leaf in CANONICAL_LEAVES)


# ---- tensors of a MixLoRA as a PEFT method ----

MIXLORA_ATTRIBUTE = "moe_lora"
"""Attribute under which a module of a PEFT model holds its adapters; PEFT appends the adapter's name."""
PEFT_MIXLORA_MAGNITUDE = "lora_magnitude_vector"
LINEAR_UPDATE = "update"


def to_peft_mixlora(name: str, layers_path: str) -> str:
    """Translate a canonical name of a MixLoRA to the one in its PEFT layout.

    Args:
        name: e.g. ``"layers.0.mlp.experts.up_proj.lora_A"``.
        layers_path: where the base keeps its decoder layers, e.g. ``"model.layers"``.

    Raises:
        ValueError: the name is not canonical.
    """
    layers, _, path = name.partition(".")
    module, _, leaf = path.rpartition(".")
    if layers != CANONICAL_LAYERS or leaf not in (*PEFT_LEAVES, "router"):
        raise ValueError(f"name={name!r}: not a canonical tensor name of a MixLoRA")
    leaf = PEFT_MIXLORA_MAGNITUDE if leaf == "magnitude" else leaf
    block, stacked, projection = module.partition(".experts.")
    if stacked:
        module, leaf = block, f"experts.{projection}.{leaf}"
    elif leaf != "router":
        leaf = f"{LINEAR_UPDATE}.{leaf}"
    return f"{PEFT_PREFIX}{layers_path}.{module}.{MIXLORA_ATTRIBUTE}.{leaf}"


def canonical_of_peft_mixlora(name: str) -> str:
    """Translate a name of a MixLoRA's PEFT layout to the canonical one: the inverse of `to_peft_mixlora`.

    Args:
        name: e.g. ``"base_model.model.model.layers.0.mlp.moe_lora.router"``; the prefix may be missing.

    Raises:
        ValueError: the name is not of that layout.
    """
    module, attribute, inner = name.removeprefix(PEFT_PREFIX).partition(f".{MIXLORA_ATTRIBUTE}.")
    parts = module.split(".")
    index = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    if not attribute or index is None:
        raise ValueError(f"name={name!r}: not a tensor of a MixLoRA in PEFT's layout")
    inner = inner.removeprefix(f"{LINEAR_UPDATE}.")
    if inner.endswith(PEFT_MIXLORA_MAGNITUDE):
        inner = inner.removesuffix(PEFT_MIXLORA_MAGNITUDE) + "magnitude"
    return ".".join([CANONICAL_LAYERS, *parts[index:], inner])


def lora_name_of_peft_mixlora(name: str) -> str:
    """Return the name in PEFT's LoRA format of a tensor of a LoRA that lives beside MixLoRAs in a PEFT model."""
    module, _, leaf = name.partition(f".{MIXLORA_ATTRIBUTE}.{LINEAR_UPDATE}.")
    return f"{module}.{leaf}.weight"


# ---- tensors and settings of the reference format ----

STRATEGIES = {"mixlora": "top_k", "mixlora-dynamic": "top_p", "mixlora-switch": "switch"}
"""The reference's names of the routing strategies -> ours."""
LEGACY_STRATEGIES = {"mixtral": "top_k", "dynamic": "top_p", "switch": "switch"}

REFERENCE_PREFIX = "mixlora.layers"
REFERENCE_FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "fc1", "fc2", "gate_up_proj"}
LEGACY_PROJECTIONS = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
_REFERENCE = tuple(
    re.compile(rf"(?:mixlora\.)?layers\.(?P<layer>0|[1-9]\d{{0,5}})\.{rest}")
    for rest in (
        r"mlp\.(?P<router>moe_gate)\.weight",
        r"(?P<router>gate)\.weight",
        r"mlp\.(?P<projection>\w+)\.experts\.(?P<expert>0|[1-9]\d{0,5})\.(?P<leaf>lora_[AB])\.weight",
        r"experts\.(?P<expert>0|[1-9]\d{0,5})\.(?P<projection>\w+)\.(?P<leaf>lora_[AB])\.weight",
        r"self_attn\.(?P<attention>\w+)\.(?P<leaf>lora_[AB])\.weight",
    )
)


def from_reference(name: str) -> tuple[str, int | None]:
    """Translate a name of the reference format, current or legacy.

    Args:
        name: e.g. ``"mixlora.layers.0.mlp.up_proj.experts.3.lora_A.weight"``.

    Returns:
        The canonical name, and the index of the expert in the stack; None where there is no stack.

    Raises:
        ValueError: the name is not the reference's.
    """
    found = next((match for pattern in _REFERENCE if (match := pattern.fullmatch(name))), None)
    if found is None:
        raise ValueError(f"name={name!r}: not a router, expert or attention tensor of the reference format")
    parts = found.groupdict()
    layer = f"{CANONICAL_LAYERS}.{parts['layer']}"
    if parts.get("router"):
        return f"{layer}.mlp.router", None
    if attention := parts.get("attention"):
        projection = reference_projection(attention)
        # Old files with a sparse_step: plain LoRA on the block of a layer without a mixture, under attention's name.
        if projection in REFERENCE_FEED_FORWARD:
            return f"{layer}.mlp.{projection}.{parts['leaf']}", None
        return f"{layer}.self_attn.{attention}.{parts['leaf']}", None
    return f"{layer}.mlp.experts.{reference_projection(parts['projection'])}.{parts['leaf']}", int(parts["expert"])


def reference_projection(name: str) -> str:
    """Return the present name of a projection, which old files of the reference call ``w1_proj`` to ``w3_proj``."""
    return LEGACY_PROJECTIONS.get(name, name)


def to_reference(name: str, expert: int | None = None) -> str:
    """Translate a canonical name to the reference's current one.

    Args:
        name: e.g. ``"layers.0.mlp.experts.up_proj.lora_A"``.
        expert: index of the expert in the stack; None where there is no stack.

    Raises:
        ValueError: the reference has no such tensor.
    """
    found = re.fullmatch(
        r"layers\.(\d+)\.(?:mlp\.(router)|mlp\.experts\.(\w+)\.(lora_[AB])|self_attn\.(\w+)\.(lora_[AB]))", name
    )
    stacked = found is not None and found[3] is not None
    if found is None or stacked != (expert is not None):
        raise ValueError(f"name={name!r}: the reference format has no tensor for it")
    layer = f"{REFERENCE_PREFIX}.{found[1]}"
    if found[2]:
        return f"{layer}.mlp.moe_gate.weight"
    if stacked:
        return f"{layer}.mlp.{found[3]}.experts.{expert}.{found[4]}.weight"
    return f"{layer}.self_attn.{found[5]}.{found[6]}.weight"
