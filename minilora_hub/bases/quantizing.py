"""Write a base as a quantized checkpoint, which a run then trains on and an adapter names as its base.

An adapter that makes up for the rounding of its base is right on that base only. The rounded weights are therefore in
files, with a fingerprint of their own, and do not depend on which version of a quantizer rounds them again.

    nf4                bitsandbytes' NF4 with double quantization (arXiv 2305.14314)
    int4, int3, int2   torchao's IntxWeightOnlyConfig, asymmetric, one scale and zero point for each group of weights;
                       stored in a byte each

config.json says under `QUANTIZED_FROM` which base it was made of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.bases.loading import load_base, load_tokenizer
from minilora_hub.bases.resolving import EMBEDDED, ResolvedBase, is_path, resolve_base
from minilora_hub.errors import BaseModelError, MissingExtraError
from minilora_hub.remote_code.adapter_files import base_fingerprint
from minilora_hub.whole_folders import require_free, whole_folder

if TYPE_CHECKING:
    import torch

KINDS = ("nf4", "int4", "int3", "int2")
GROUP_SIZE = 64
QUANTIZED_FROM = "quantized_from"


@dataclass(frozen=True)
class QuantizedFrom:
    """What a quantized checkpoint was made of.

    Attributes:
        base: ``"embedded"``, the absolute path of a folder, or a Hub id.
        revision: its commit on the Hub.
        fingerprint: hash of its weights.
    """

    base: str
    revision: str | None
    fingerprint: str

    @classmethod
    def of(cls, folder: Path) -> QuantizedFrom | None:
        """Read it from a checkpoint's config.json; None for one that another tool has written."""
        from transformers import AutoConfig

        noted = getattr(AutoConfig.from_pretrained(folder, trust_remote_code=False), QUANTIZED_FROM, None)
        return cls(**noted) if isinstance(noted, dict) else None


def quantize_base(
    base: str,
    kind: str,
    out: Path,
    *,
    group_size: int | None = None,
    revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Quantize a base's linears, and write it to a folder that transformers loads as a base.

    Args:
        base: ``"embedded"``, a folder or a Hub id.
        kind: one of `KINDS`.
        out: the folder: new or empty. It appears once it is complete.
        group_size: weights that share a scale, of the integer kinds. Default: `GROUP_SIZE`.
        revision: of a base on the Hub.
        dtype: of what is not quantized. Default: that of the checkpoint.
        progress: called with a line before and after loading.

    Raises:
        AdapterError: `out` is in use or cannot be written.
        BaseModelError: the base cannot be loaded, is quantized already, or has no linear that this kind can take.
        MissingExtraError: the quantizer is not installed.
        ValueError: `kind` or `group_size` is out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"to={kind!r}: must be one of {', '.join(KINDS)}")
    if kind == "nf4" and group_size is not None:
        raise ValueError(f"group_size={group_size}: NF4's groups have 64 weights; leave it out")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size={group_size}: must be at least 1")
    if revision is not None and (base == EMBEDDED or is_path(base)):
        raise ValueError(f"revision={revision!r}: base {base!r} is not on the Hub, and has no revisions")
    require_free(out)
    package, extra = ("bitsandbytes", "quant") if kind == "nf4" else ("torchao", "lowbit")
    if find_spec(package) is None:
        raise MissingExtraError(package, extra)
    resolved = resolve_base(base, revision=revision)
    tokenizer = load_tokenizer(resolved)
    settings = _settings(kind, group_size or GROUP_SIZE, resolved)
    model = load_base(resolved, dtype=dtype, progress=progress, quantization_config=settings)
    name = str(Path(base).absolute()) if Path(base).is_dir() else base
    made_of = QuantizedFrom(name, resolved.revision, base_fingerprint(str(resolved.path)))
    setattr(model.config, QUANTIZED_FROM, asdict(made_of))
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _settings(kind: str, group_size: int, base: ResolvedBase) -> Any:
    """Return transformers' settings of a quantizer, once it is known that the base's linears fit them."""
    from torch import nn
    from transformers import BitsAndBytesConfig, TorchAoConfig

    from minilora_hub.bases.skeleton import find_base

    source = find_base(str(base.path))
    if getattr(source.config, "quantization_config", None) is not None:
        raise BaseModelError(f"base {base.name!r} is quantized already: pass the base that it was made of")
    layers = source.skeleton.get_submodule(source.layers_path).named_modules()
    widths = {path: module.in_features for path, module in layers if isinstance(module, nn.Linear)}
    if not widths:
        raise BaseModelError(f"base {base.name!r} has no linears in its layers, which are what is quantized")
    if kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    for path, width in widths.items():
        if width % group_size:
            raise BaseModelError(
                f"base {base.name!r}: {path} has {width} inputs, which groups of {group_size} do not divide: pass "
                "another --group-size"
            )
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerGroup

    return TorchAoConfig(
        IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, kind), granularity=PerGroup(group_size), mapping_type=MappingType.ASYMMETRIC
        )
    )
