"""Published adapters as models of vLLM: ``vllm serve user/adapter`` loads the base and folds the adapter into it.

A DoRA becomes the base's own class with other weights. A top-k MixLoRA (with DoRA or without) becomes the mixture of
experts of the base's family, whose weights are computed while the base's checkpoint is read. The result is a model of
vLLM's own, with its kernels, tensor parallelism and quantisation while loading.

vLLM's registry looks up the two classes here; instantiating one returns an object of vLLM's class for the folded model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mixtral import MixtralForCausalLM as Mixtral
from vllm.model_executor.models.utils import init_vllm_registered_model

from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.adapter_folder.reading import check_against_base, check_values
from minilora_hub.bases.skeleton import BaseSource, find_base
from minilora_hub.errors import AdapterError, MiniLoraError
from minilora_hub.formats.folding import Folding
from minilora_hub.formats.moe import config_as_moe
from minilora_hub.formats.moe_architectures import ARCHITECTURES
from minilora_hub.integrations.vllm.adapter_reading import plain_torch
from minilora_hub.remote_code.base_structure import LinearSite, plan_sites

BASE_PREFIX = "base of the adapter:"
"""Prefix that marks the base's tensors in the stream from vLLM's reader; no tensor's own name begins with it."""
BASE_FILES = ["model*.safetensors"]
"""Neither pickles nor the second copy of the weights that some repos have under another name."""

CRASHING = {"olmo2": "FlexOlmo"}
"""{type of a base: its mixture of experts, at whose first forward vLLM 0.32.0 ends with signal 11 on a CPU}."""

logger = logging.getLogger("vllm.minilora_hub")


class DoraForCausalLM(LlamaForCausalLM):
    """A DoRA in our format, as vLLM's registry sees it: a decoder with the features common to vLLM's decoders."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        ours = vllm_config.model_config.hf_config
        base = _base_of(ours)
        return _made_of(vllm_config, prefix, base, base.config, None)


class MixLoraForCausalLM(Mixtral):
    """A MixLoRA in our format, as vLLM's registry sees it."""

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        ours, dtype = vllm_config.model_config.hf_config, vllm_config.model_config.dtype
        base = _base_of(ours)
        try:
            if crashing := CRASHING.get(base.config.model_type):
                raise ValueError(f"a base of type {base.config.model_type!r}: {crashing} crashes in vLLM 0.32.0")
            with plain_torch():
                sites = plan_sites(base.skeleton, ours)
            mixtures = sum(not isinstance(site, LinearSite) for site in sites)
            config = config_as_moe(ours, base.config, mixtures, dtype)
        except (MiniLoraError, ValueError) as error:
            raise ValueError(f"adapter {vllm_config.model_config.model!r}: {error}") from error
        return _made_of(vllm_config, prefix, base, config, ARCHITECTURES[base.config.model_type])


def _base_of(ours: Any) -> BaseSource:
    if ours.target_parameters:
        raise ValueError(
            f"target_parameters={ours.target_parameters}: an adapter on a base's stacked experts cannot be served as a "
            "model; `minilora export --to dense` merges it into its base"
        )
    base = find_base(ours.base_model_name_or_path, ours.base_model_revision)
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            f"base {base.name!r} has a quantised checkpoint, into which an adapter cannot be folded: name the base it "
            "was made from (--hf-overrides), and quantise while loading (--quantization)"
        )
    return base


def _made_of(vllm_config: VllmConfig, prefix: str, base: BaseSource, config: Any, architecture: Any) -> Any:
    """Return a vLLM model with this configuration whose `load_weights` folds the adapter into the base's weights."""
    folded = vllm_config.with_hf_config(config, architectures=config.architectures)
    folded.model_config.hf_text_config = folded.model_config.hf_config  # else the base's, which Qwen3Moe reads
    model: Any = init_vllm_registered_model(folded, prefix=prefix)
    model.allow_patterns_overrides = [WEIGHTS]
    model.secondary_weights = [
        DefaultModelLoader.Source(base.location, base.revision, prefix=BASE_PREFIX, allow_patterns_overrides=BASE_FILES)
    ]
    settings = vllm_config.model_config
    load = model.load_weights

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> Any:
        try:
            return _load(load, weights, settings, base, architecture)
        except (MiniLoraError, ValueError) as error:
            raise ValueError(f"adapter {settings.model!r} on the base {base.name!r}: {error}") from error

    model.load_weights = load_weights
    return model


def _load(
    load: Callable[[Iterator[tuple[str, Tensor]]], Any],
    weights: Iterable[tuple[str, Tensor]],
    settings: Any,
    base: BaseSource,
    architecture: Any,
) -> Any:
    """Read the adapter's tensors, which come first, then load the base's with the adapter folded in."""
    tensors: dict[str, Tensor] = {}
    stream = iter(weights)
    first: list[tuple[str, Tensor]] = []
    for name, tensor in stream:
        if name.startswith(BASE_PREFIX):
            first = [(name, tensor)]
            break
        check_values(name, tensor)
        tensors[name] = tensor.clone()
    if not first:
        raise AdapterError("vLLM read no tensor of the base; --load-format must be auto or safetensors")
    ours = settings.hf_config
    with plain_torch():
        sites = check_against_base(ours, tensors, base)
    folding = Folding(ours, tensors, sites, settings.dtype, architecture)
    loaded = load(folding.fold((name.removeprefix(BASE_PREFIX), tensor) for name, tensor in chain(first, stream)))
    _warn_of_other_base(ours, base)
    return loaded


def _warn_of_other_base(ours: Any, base: BaseSource) -> None:
    if "unknown" not in (ours.base_fingerprint, base.fingerprint) and ours.base_fingerprint != base.fingerprint:
        logger.warning(
            "minilora_hub: the adapter was trained on a base with fingerprint %s, and %r has %s: it may answer "
            "differently from what its author saw",
            ours.base_fingerprint[:19],
            base.name,
            base.fingerprint[:19],
        )
