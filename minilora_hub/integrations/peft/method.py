"""MixLoRA as a PEFT method, built from the modules of `remote_code`. Only this file uses PEFT's internals.

`MixLoraModel` inserts `MixLoraLayer`s (layer.py) at the sites of a configuration (sites.py). It computes nothing.

PEFT (0.21) has no entry point for methods: this module extends its closed Enum `PeftType`, and removes the restriction
of a `PeftModel` to adapters of one type for a LoRA beside MixLoRAs.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import peft
import torch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
from peft.utils.integrations import init_empty_weights
from peft.utils.other import set_additional_trainable_modules
from torch import nn

from minilora_hub.adapter_folder.names import MIXLORA_ATTRIBUTE
from minilora_hub.errors import MiniLoraError
from minilora_hub.integrations.peft.config import MIXLORA, MixLoraPeftConfig, PeerLoraConfig, as_peer
from minilora_hub.integrations.peft.files import remap_for_load, saved_name
from minilora_hub.integrations.peft.layer import CANNOT_MERGE, MixLoraLayer, build_module, refuse_several
from minilora_hub.integrations.peft.sites import holder_of, plain_base, plan_adapter
from minilora_hub.integrations.trl import ATTRIBUTE, RouterLoss


class MixLoraModel(BaseTuner):
    """PEFT's tuner for `MixLoraPeftConfig`: inserts `MixLoraLayer`s into a model and removes them."""

    prefix = "moe_"  # PEFT warns of an adapter whose name is part of it, as "mixlora", "mix" and "lora" should not be
    tuner_layer_cls = MixLoraLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # of a LoRA beside a MixLoRA

    # ---- injection ----

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if isinstance(peft_config, PeerLoraConfig):
            return super()._prepare_adapter_config(peft_config, model_config)
        return peft_config  # no targets means all linears; `plan_adapter` decides

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Inject an adapter. Everything is planned and built first, so that a failure does not change the model.

        This replaces PEFT's loop over the modules, which skips what is inside a layer that carries an adapter already:
        the linears of a feed-forward block. What PEFT does after its loop is done here in the same way.
        """
        if state_dict is not None:
            raise ValueError("state_dict: the configuration determines where a MixLoRA goes, not the tensors of a file")
        config: Any = as_peer(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        self._check_tied_modules(model, config)
        first = not any(isinstance(module, MixLoraLayer) for module in model.modules())
        trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
        with plain_base(model, MixLoraLayer), init_empty_weights() if low_cpu_mem_usage else nullcontext():
            plan = plan_adapter(model, config, adapter_name, check_target_module_exists)
            built = {site.path: build_module(model, site, plan, config) for site in plan.sites}
        places = [(site, *holder_of(model, site.path, MixLoraLayer)) for site in plan.sites]
        if config.exclude_modules and not plan.excluded:
            warnings.warn(f"exclude_modules={config.exclude_modules!r}: excludes no module of the base", stacklevel=2)
        config.target_modules = plan.target_modules
        with undone_on_failure(model, adapter_name):
            for site, holder, name in places:
                layer: Any = getattr(holder, name)
                if not isinstance(layer, MixLoraLayer):
                    layer = MixLoraLayer(layer, site)
                    setattr(holder, name, layer)
                layer.add(adapter_name, built[site.path])
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            self._mark_only_adapters_as_trainable(model)
            set_additional_trainable_modules(
                model=model,
                peft_config=config,
                model_config=self.get_model_config(model),
                adapter_name=adapter_name,
                activate_adapter=adapter_name in self.active_adapters,
            )
        self.targeted_module_names = list(dict.fromkeys([*self.targeted_module_names, *plan.linears]))
        if first:
            self._trainable_before = [parameter for parameter, was in trainable.items() if was]
        else:
            for parameter, was in trainable.items():
                parameter.requires_grad_(was)
        RouterLoss.on(model, MixLoraLayer).refresh()

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("PEFT's loop over the modules, which calls this, is not used: see inject_adapter")

    # ---- activation ----

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        refuse_several(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        if ATTRIBUTE in self.model.__dict__:
            RouterLoss.on(self.model, MixLoraLayer).refresh()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is not None:
            raise ValueError(
                f"adapter_names={names!r}: a MixLoRA serves one adapter per call: set_adapter(…) and call once per "
                "adapter, or let minilora_hub.CompareEngine answer a batch with several"
            )
        yield

    # ---- removal ----

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        # Layers choose a successor among their own adapters; here all take the same one.
        if was_active and self.peft_config:
            self.set_adapter(sorted(self.peft_config)[0])
        RouterLoss.on(self.model, MixLoraLayer).refresh()

    def _check_merge_allowed(self) -> NoReturn:
        raise ValueError(CANNOT_MERGE)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        # PEFT does not look inside a wrapped block, where the linears of another adapter may be.
        for layer in [module for module in self.model.modules() if isinstance(module, MixLoraLayer)]:
            for inner in layer.base_layer.modules():
                for name, child in list(inner.named_children()):
                    if isinstance(child, MixLoraLayer):
                        setattr(inner, name, child.base_layer)
        RouterLoss.on(self.model, MixLoraLayer).remove()
        super()._unload_and_optionally_merge(False, *args, **kwargs)
        for parameter in self._trainable_before:
            parameter.requires_grad_(True)
        return self.model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    # ---- files ----

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        marker = f".{MIXLORA_ATTRIBUTE}.{adapter_name}."
        as_lora = isinstance(config, PeerLoraConfig)
        return {
            saved_name(key, adapter_name, as_lora=as_lora): value for key, value in state_dict.items() if marker in key
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return remap_for_load(model, adapter_name, state_dict, as_lora=isinstance(config, PeerLoraConfig))


@contextmanager
def undone_on_failure(model: Any, adapter_name: str) -> Iterator[None]:
    """If the block fails, remove an adapter that did not exist before, so that no partly loaded adapter remains."""
    if not isinstance(model, nn.Module):  # PEFT says what is wrong with it
        yield
        return
    before = [module for module in model.modules() if isinstance(module, MixLoraLayer)]
    known = any(adapter_name in layer.moe_lora for layer in before)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    except BaseException:
        if not known and any(isinstance(module, MixLoraLayer) for module in model.modules()):
            _take_out(model, adapter_name, before)
            for parameter in trainable:
                parameter.requires_grad_(True)
        raise


def _take_out(model: Any, adapter_name: str, before: list[MixLoraLayer]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, MixLoraLayer):
                if adapter_name in child.moe_lora:
                    child.delete_adapter(adapter_name)
                if child not in before:
                    setattr(module, name, child.base_layer)
    for module in list(model.modules()):
        module.__dict__.get("peft_config", {}).pop(adapter_name, None)
        if not before and ATTRIBUTE in module.__dict__:
            module.__dict__[ATTRIBUTE].remove()
            module.__dict__.pop("peft_config", None)


# ---- registration ----

HOOKS = (
    "_check_merge_allowed",
    "_create_and_replace",
    "_get_adapter_state_dict",
    "_prepare_adapter_config",
    "_remap_adapter_state_dict_for_load",
    "_replace_module",
    "_unload_and_optionally_merge",
)
"""Methods of PEFT's BaseTuner that this file overrides: a version without one of them would silently ignore it."""


def register() -> None:
    """Register MIXLORA with PEFT. Repeated calls have no effect.

    Raises:
        MiniLoraError: this version of PEFT is built differently; the message says which are known.
    """
    if MIXLORA in PeftType.__members__:
        return
    missing = [name for name in HOOKS if not hasattr(BaseTuner, name)]
    enum_tables = all(hasattr(PeftType, name) for name in ("_member_map_", "_value2member_map_", "_member_names_"))
    if missing or not enum_tables or "peft_config" not in inspect.signature(PeftModel.add_adapter).parameters:
        raise MiniLoraError(
            f"peft {peft.__version__}: MixLoRA cannot be registered, its internals are not those of peft 0.21 "
            f"({', '.join(missing) or 'PeftType or PeftModel.add_adapter'}); install peft>=0.21,<0.22"
        )
    member = str.__new__(PeftType, MIXLORA)
    member._name_, member._value_ = MIXLORA, MIXLORA
    type.__setattr__(PeftType, MIXLORA, member)
    PeftType._member_map_[MIXLORA] = member
    PeftType._value2member_map_[MIXLORA] = member
    PeftType._member_names_.append(MIXLORA)
    register_peft_method(
        name=MIXLORA.lower(), config_cls=MixLoraPeftConfig, model_cls=MixLoraModel, prefix=MixLoraModel.prefix
    )
    _adapt_peft_model()


def _adapt_peft_model() -> None:
    """Change two things for models with MixLoRAs only.

    A LoraConfig that is added becomes a PeerLoraConfig, and a file that does not fit leaves the model as it was.
    """
    add_adapter, load_adapter = PeftModel.add_adapter, PeftModel.load_adapter
    from_pretrained = PeftModel.from_pretrained.__func__  # type: ignore[attr-defined]

    @functools.wraps(add_adapter)
    def add(self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        config = as_peer(peft_config) if _carries_mixloras(self) else peft_config
        return add_adapter(self, adapter_name, config, *args, **kwargs)

    @functools.wraps(load_adapter)
    def load(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        with undone_on_failure(self, adapter_name) if _carries_mixloras(self) else nullcontext():
            return load_adapter(self, model_id, adapter_name, *args, **kwargs)

    @functools.wraps(from_pretrained)
    def from_file(cls: Any, model: Any, model_id: Any, adapter_name: str = "default", *args: Any, **kwargs: Any) -> Any:
        with undone_on_failure(model, adapter_name):
            return from_pretrained(cls, model, model_id, adapter_name, *args, **kwargs)

    PeftModel.add_adapter, PeftModel.load_adapter = add, load  # type: ignore[method-assign]
    PeftModel.from_pretrained = classmethod(from_file)  # type: ignore[method-assign,assignment]


def _carries_mixloras(peft_model: Any) -> bool:
    """Whether a model of PEFT is one of MixLoRAs."""
    # PEFT calls methods of PeftModel on a PeftMixedModel, too, which is another class.
    return isinstance(getattr(peft_model, "base_model", None), MixLoraModel)


register()
