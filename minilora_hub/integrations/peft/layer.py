"""A layer that holds the adapters of one base module in a PEFT model.

A `MixLoraLayer` replaces a linear or a whole feed-forward block, and holds, per adapter name, a module of
`remote_code` over that one base module: an `AdaptedLinear` or a `MixtureOfLoraExperts`. It calls the active one, or the
base.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from minilora_hub.integrations.peft.sites import Plan
from minilora_hub.remote_code.adapted_linear import LowRankUpdate
from minilora_hub.remote_code.attach import build_modules
from minilora_hub.remote_code.base_structure import LinearSite
from minilora_hub.remote_code.linear_layers import compute_dtype, layer_device, linear_shape
from minilora_hub.remote_code.routing import router_loss_weights

CANNOT_MERGE = (
    "a MixLoRA cannot be merged into its base: every token takes its own experts. One with top-k routing can be "
    "exported as a Mixtral checkpoint (minilora export --to mixtral); unload() gives the base back; a LoRA beside it "
    "merges in a PeftModel of its own"
)


class PeftUpdate(LowRankUpdate):
    """A LowRankUpdate with its magnitude under PEFT's name, by which TRL knows what must stay in fp32.

    It casts every other trainable tensor on a quantised base to bf16.
    """

    @property
    def magnitude(self) -> Any:  # type: ignore[override]
        return self._parameters["lora_magnitude_vector"]


class MixLoraLayer(nn.Module, BaseTunerLayer):
    """A base module and the modules of several adapters over it, of which at most one is called.

    Args:
        base_layer: a linear or a feed-forward block of the base.
        site: its site. A block maps the hidden size to itself.
    """

    adapter_layer_names = ("moe_lora",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, site: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        linear = isinstance(site, LinearSite)
        self.in_features = site.in_features if linear else site.hidden_size
        self.out_features = site.out_features if linear else site.hidden_size
        self.moe_lora = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        # A plain reference, not a registered module: a compiled forward reads the tensors through it, so that another
        # adapter of the same shapes is not another graph.
        self.__dict__["current"] = None
        self.train(base_layer.training)

    def add(self, name: str, module: nn.Module) -> None:
        """Add `module` as the adapter `name`. Its base is registered once, on this layer."""
        for base in ("base_layer", "base_block"):
            if base in module._modules:
                module.__dict__[base] = module._modules.pop(base)
        self.moe_lora[name] = module
        self._select()

    def _select(self) -> None:
        names = [name for name in self.active_adapters if name in self.moe_lora]
        usable = names and not self._disable_adapters
        self.__dict__["current"] = self.moe_lora[names[0]] if usable else None

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        current: Any = self.current
        return self.base_layer(*args, **kwargs) if current is None else current(*args, **kwargs)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        refuse_several(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._select()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._select()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._select()

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(CANNOT_MERGE)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move it to the base's device without changing the dtype, which PEFT casts later if requested."""
        if adapter_name in self.moe_lora:
            module = self.moe_lora[adapter_name]
            if not any(parameter.is_meta for parameter in module.parameters()):
                module.to(device or layer_device(self.base_layer))


def refuse_several(adapter_names: Any) -> None:
    """Raise unless at most one adapter is named."""
    if not isinstance(adapter_names, str) and len(adapter_names) > 1:
        raise ValueError(
            f"adapter_name={list(adapter_names)!r}: one adapter can be active, not {len(adapter_names)}: outputs of "
            "mixtures do not add up"
        )


def build_module(model: nn.Module, site: Any, plan: Plan, config: Any) -> nn.Module:
    """Return the adapter's module for one site, with fresh weights, over the base module that is there."""
    base = model.get_submodule(site.path)
    seed = int(torch.randint(2**62, ()))  # from torch's global state, as PEFT's own initialisation
    (module,) = build_modules(model, plan.config, [site], seed=seed).values()
    generator = torch.Generator().manual_seed(seed + 1)
    for update in [part for part in module.modules() if isinstance(part, LowRankUpdate)]:
        if not config.init_lora_weights:
            with torch.no_grad():
                bound = update.lora_B.shape[-1] ** -0.5
                update.lora_B.copy_(torch.empty(update.lora_B.shape).uniform_(-bound, bound, generator=generator))
        if not isinstance(site, LinearSite):
            update.dropout.p = float(config.expert_lora["lora_dropout"])
        if update.magnitude is not None:
            update._parameters["lora_magnitude_vector"] = update._parameters.pop("magnitude")
            update.__class__ = PeftUpdate
    if not isinstance(site, LinearSite):
        module.loss_weights = router_loss_weights(plan.config)
    module.to(compute_dtype(next(part for part in base.modules() if linear_shape(part))))
    return module.train(base.training)
