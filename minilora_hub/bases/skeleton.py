"""A base without its weights: its configuration, its structure on the meta device, its tokenizer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minilora_hub.bases.embedded import HUB_ID
from minilora_hub.bases.loading import load_base
from minilora_hub.bases.resolving import EMBEDDED, is_path, resolve_base
from minilora_hub.errors import AdapterError, BaseModelError

LENGTH = 65_537  # a prime, so that no two rows of a matrix are alike
LARGE_BLOCK = 2**28  # parameters from which a block is called in half the bytes


@dataclass(frozen=True)
class BaseSource:
    """A base, of which only small files are read until its weights are asked for.

    Attributes:
        name: its name in our configurations: a Hub id, a folder, or ``"embedded"``.
        hub_id: its id on the Hub; None for a folder.
        location: the folder or id that transformers loads.
        revision: the revision on the Hub.
    """

    name: str
    hub_id: str | None
    location: str
    revision: str | None = None

    @classmethod
    def of_model(cls, model: Any) -> BaseSource:
        """Describe a base that is loaded, and stands for its own skeleton."""
        name = str(getattr(model.config, "name_or_path", "") or "base")
        # Only the last part of a folder's path: visitors of a page see this name.
        source = cls(name=os.path.basename(name) if os.path.isabs(name) else name, hub_id=None, location="")
        source.__dict__.update(config=model.config, skeleton=model)
        return source

    @cached_property
    def config(self) -> Any:
        """Its configuration.

        Raises:
            BaseModelError: it cannot be found or read.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.location, revision=self.revision, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BaseModelError(f"the configuration of the base {self.name!r} cannot be read: {reason}") from error

    @cached_property
    def fingerprint(self) -> str:
        """The hash of its weights, ``"unknown"`` where they are not on this machine."""
        from minilora_hub.remote_code.adapter_files import base_fingerprint

        return base_fingerprint(self.location, self.revision)

    @cached_property
    def commit(self) -> str | None:
        """The commit that was read, for a base from the Hub."""
        from minilora_hub.remote_code.adapter_files import cached_commit

        return None if os.path.isdir(self.location) else cached_commit(self.location, self.revision) or self.revision

    @cached_property
    def skeleton(self) -> Any:
        """The base without weights; see `skeleton`."""
        return skeleton(self.config)

    @cached_property
    def layers_path(self) -> str:
        """Where it keeps its decoder layers, e.g. ``"model.layers"``."""
        from minilora_hub.remote_code.layer_stacks import find_decoder_layers

        return str(find_decoder_layers(self.skeleton)[0])

    def load(self, dtype: Any = "auto") -> Any:
        """Load it on the CPU, in eval mode.

        Raises:
            BaseModelError: it cannot be loaded, or its checkpoint lacks a tensor.
        """
        return load_base(resolve_base(self.name, revision=self.revision), dtype=dtype)

    def weight(self, path: str) -> Any:
        """Return the weight of one of its modules, for which a base that is not loaded is loaded as a whole."""
        weight = self.skeleton.get_submodule(path).weight
        return self.load().get_submodule(path).weight if weight.is_meta else weight

    @cached_property
    def tokenizer(self) -> Any | None:
        """Its tokenizer; None where it has none that can be read."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.location, revision=self.revision, config=self.config, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError):
            return None

    @cached_property
    def generation_settings(self) -> Any:
        """Its GenerationConfig."""
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.location, revision=self.revision or "main")
        except (OSError, ValueError):
            return GenerationConfig.from_model_config(self.config)


def find_base(name: str | None, revision: str | None = None) -> BaseSource:
    """Find a base without fetching its weights.

    Args:
        name: a Hub id, a folder, or ``"embedded"``.
        revision: its revision on the Hub.

    Raises:
        AdapterError: `name` is None: the adapter names no base, nor does the user.
        BaseModelError: a folder does not exist or is no base.
    """
    if not name:
        raise AdapterError("the adapter names no base (base_model_name_or_path): pass base= (--base)")
    if name == EMBEDDED or is_path(name):
        found = resolve_base(name)
        return BaseSource(name, found.hub_id, str(found.path))
    return BaseSource(name, name, name, revision)


def require_use_of(revision: str | None, found: BaseSource) -> None:
    """Refuse the revision that a user names beside a base that has none: a folder, or the embedded one.

    Raises:
        AdapterError: it would have no effect.
    """
    if revision is not None and found.commit is None:
        raise AdapterError(
            f"base_revision={revision!r}: has no effect on the base {found.name!r}, only on one on the Hub"
        )


def hub_name(name: str | None) -> str | None:
    """Return the Hub id that a base's name stands for; None for a folder."""
    if name == EMBEDDED:
        return HUB_ID
    return None if not name or is_path(name) else name


def skeleton(config: Any, blocks: bool = True, auto_class: str = "AutoModelForCausalLM", towers: Any = None) -> Any:
    """Build a model from its configuration on the meta device, where its weights take no memory.

    Args:
        config: the base's configuration.
        blocks: whether one feed-forward block of each kind gets random weights on the CPU. A MixLoRA
            finds out what the parts of a block do by calling it.
        auto_class: name of the Auto class that builds it.
        towers: which lists of layers are adapted; see `AdapterConfig`.

    Raises:
        AdapterError: transformers cannot build it.
    """
    import torch
    import transformers

    from minilora_hub.remote_code.layer_stacks import find_layer_stacks

    try:
        with torch.device("meta"):
            base = getattr(transformers, auto_class).from_config(config, trust_remote_code=False)
        stacks = find_layer_stacks(base, towers)
        if blocks:
            _make_blocks_real([layer for _, layers in stacks.values() for layer in layers])
    except Exception as error:  # another library's code on untrusted settings may raise anything
        reason = " ".join(str(error).split())[:200]
        reason = f"{type(error).__name__}: {reason}"
        raise AdapterError(f"the base cannot be built from its configuration ({reason})") from error
    return base.eval()


def _make_blocks_real(layers: Any) -> None:
    """Give all blocks of one kind the same random weights on the CPU."""
    import torch

    from minilora_hub.remote_code.linear_layers import linear_shape

    # Repeated rather than drawn anew: a block of a large base has hundreds of millions of weights.
    some = torch.randn(LENGTH, generator=torch.Generator().manual_seed(0)) * 0.02
    seen: dict[Any, Any] = {}
    for module in (module for layer in layers for module in layer.modules()):
        shapes = tuple((name, linear_shape(child)) for name, child in module.named_children() if linear_shape(child))
        if len(shapes) not in (2, 3):
            continue
        first = seen.setdefault((type(module), shapes), module)
        if first is not module:
            for ours, its in zip(module.modules(), first.modules(), strict=True):
                ours._parameters.update(its._parameters)
                ours._buffers.update(its._buffers)
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        module.to(torch.bfloat16 if size > LARGE_BLOCK else torch.float32).to_empty(device="cpu")
        with torch.no_grad():
            for number, parameter in enumerate(module.parameters()):
                start = 1009 * number  # linears of one shape must differ, so that they can be told apart
                values = some.repeat(-(-(start + parameter.numel()) // LENGTH))[start:]
                parameter.copy_(values[: parameter.numel()].view_as(parameter))
        for buffer in module.buffers():
            buffer.zero_()
