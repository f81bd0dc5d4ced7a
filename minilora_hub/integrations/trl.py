"""Add the router losses of a MixLoRA to the loss of any trainer: transformers' Trainer, and TRL's trainers.

Hooks on the causal language model see every call of it, even where TRL has replaced its `forward` by one that calls the
decoder and the head separately and computes the loss from log-probabilities:

- a call with labels, in training: the penalty is added to the loss in the outputs;
- a call of TRL's fused head: the outputs get `aux_loss`, and TRL's trainers treat the model as one of transformers'
  mixtures: they add `router_aux_loss_coef * aux_loss` to their loss, log it, and have a setting for it. They recognise
  a mixture by two fields of the base's configuration, which are set while a MixLoRA is active on it;
- a call with `output_router_logits=True`: the outputs are those of `MixLoraForCausalLM`.

The penalty is the sum of the weighted router losses over the tokens that are not padding. In an accumulated batch each
micro-batch counts by its share of the labels (in TRL's trainers: all count alike).

This holds for a MixLoRA in a PEFT model. A `MixLoraForCausalLM` computes all this itself except in TRL's fused head:
for those calls it gets the same hooks, see `register`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version

from minilora_hub.remote_code.mixlora_model import INTEGRATIONS, MixLoraCausalLMOutput, share_of_items
from minilora_hub.remote_code.mixture import MixtureOfLoraExperts
from minilora_hub.remote_code.routing import router_loss_weights, router_losses
from minilora_hub.remote_code.routing_record import (
    _COMPILED_RECORD,
    checkpoint_contexts,
    current_record,
    record_routing,
)

ATTRIBUTE = "_minilora_router_loss"
FUSED_HEAD = "fused_lm_head"
"""The argument with which TRL's trainers call their replacement of the forward."""
ANNOUNCED = ("output_router_logits", "router_aux_loss_coef")

_OPEN: ContextVar[tuple[OpenCall, ...]] = ContextVar("minilora_open_calls", default=())


@dataclass(frozen=True, eq=False)
class OpenCall:
    """A forward that is running.

    Attributes:
        model: the model that was called.
        mixture: one of the active mixtures; None where no MixLoRA is active.
        record: the routing that is recorded.
        context: the context manager to exit.
        asked: whether the caller requested the outputs of the routers.
    """

    model: Any
    mixture: Any
    record: Any
    context: Any
    asked: bool


class RouterLoss:
    """The hooks on one model, and the fields of its base's configuration by which TRL recognises a mixture.

    From TRL 1.16 on, trainers compute the loss from log-probabilities, and add ``router_aux_loss_coef *
    outputs.aux_loss`` where the configuration has the fields `ANNOUNCED`. (Older versions take the loss from the
    outputs, and would look for more fields than these.)

    Args:
        model: the base, a model of transformers.
        layer_class: the class of layers whose `current` is the active adapter's module.

    Attributes:
        coefficient: the coefficient that was written into the configuration; None where nothing was.
    """

    def __init__(self, model: Any, layer_class: type) -> None:
        self.model, self.layer_class = model, layer_class
        self.layers: list[Any] = []
        self.text_config = model.config.get_text_config()
        self.coefficient: float | None = None
        self.running: list[OpenCall] = []  # in any thread
        self.handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    @classmethod
    def on(cls, model: Any, layer_class: type) -> RouterLoss:
        """Return the hooks of this model, and put them there first if there are none."""
        hooks = model.__dict__.get(ATTRIBUTE)
        if hooks is None:
            hooks = model.__dict__[ATTRIBUTE] = cls(model, layer_class)
        return hooks

    def refresh(self) -> None:
        """Find the active adapter again. Must be called when adapters are added, deleted or switched."""
        self.layers = [module for module in self.model.modules() if isinstance(module, self.layer_class)]
        self._withdraw()
        weights = self._weights(self._active_mixture())
        known = any(hasattr(self.text_config, field) for field in ANNOUNCED)
        if weights and not known and _trl_adds_losses():
            self.coefficient = weights.get("aux_loss", 1.0)
            self.text_config.output_router_logits, self.text_config.router_aux_loss_coef = False, self.coefficient

    def remove(self) -> None:
        """Remove hooks and fields."""
        self._withdraw()
        for handle in self.handles:
            handle.remove()
        del self.model.__dict__[ATTRIBUTE]

    def _withdraw(self) -> None:
        if self.coefficient is not None:
            for field in ANNOUNCED:
                delattr(self.text_config, field)
        self.coefficient = None

    def _active_mixture(self) -> Any:
        return next((layer.current for layer in self.layers if isinstance(layer.current, MixtureOfLoraExperts)), None)

    def _weights(self, mixture: Any) -> dict[str, float]:
        return {} if mixture is None else mixture.loss_weights

    # ---- the hooks ----

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        asked = kwargs.get("output_router_logits")
        if asked is None:
            asked = self.coefficient is not None and self.text_config.output_router_logits
        if not asked and not model.training:
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != "output_router_logits"}
        if kwargs.get(FUSED_HEAD):
            kwargs["output_router_logits"] = False  # otherwise the model expects them in the decoder's outputs
        mixture = self._active_mixture()
        adds_loss = model.training and bool(self._weights(mixture)) and kwargs.get("labels") is not None
        needs_mask = mixture is not None and model.training and mixture.routing.needs_token_mask
        if asked or adds_loss or needs_mask:
            self._open(model, mixture, _token_mask(args, kwargs), bool(asked))
        return args, kwargs

    @torch.compiler.disable
    def _open(self, model: Any, mixture: Any, mask: Any, asked: bool) -> None:
        """Start recording, outside of compiled code, which cannot use a ContextVar."""
        if model.training and mask is not None and mixture is not None and mixture.routing.needs_token_mask:
            _pass_mask_to_checkpoints(model)
        context = record_routing(mask)
        call = OpenCall(model, mixture, context.__enter__(), context, asked)
        _OPEN.set((*_OPEN.get(), call))
        self.running.append(call)
        _COMPILED_RECORD[0] = call.record  # where compiled layers look

    def _after(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        return self._close(model, kwargs, outputs) if self.running else None

    @torch.compiler.disable
    def _close(self, model: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        calls = _OPEN.get()
        if not calls or calls[-1].model is not model:
            return None
        call = calls[-1]
        _OPEN.set(calls[:-1])
        self.running.remove(call)
        _COMPILED_RECORD[0] = calls[-2].record if len(calls) > 1 else None
        call.context.__exit__(None, None, None)
        if outputs is None:  # the call has failed
            return None
        _add_to_enclosing(call.record)
        return self._complete(call, kwargs, outputs)

    def _complete(self, call: OpenCall, kwargs: dict[str, Any], outputs: Any) -> Any:
        losses, penalty = {}, None
        if call.mixture is not None:
            trained = call.model.training and torch.is_grad_enabled() and call.mixture.router.requires_grad
            losses = router_losses(call.record, call.mixture.routing, trained)
            if weights := self._weights(call.mixture):
                penalty = sum(weight * losses[name] for name, weight in weights.items())
        if kwargs.get(FUSED_HEAD):
            return self._with_aux_loss(outputs, penalty)
        labels = kwargs.get("labels")
        if penalty is not None and call.model.training and labels is not None:
            items = labels if labels.dim() > 1 else labels.unsqueeze(-1).expand(-1, 2)  # a label a sequence: all count
            share = share_of_items(items, kwargs.get("num_items_in_batch"))
            outputs = _add_to_loss(outputs, penalty * self._scale() * share)
        return _with_routing(outputs, losses, call.record) if call.asked else outputs

    def _with_aux_loss(self, outputs: Any, penalty: Any) -> Any:
        """Add `aux_loss` to the outputs of TRL's forward: the weighted losses, divided by the coefficient."""
        if penalty is None:
            outputs["aux_loss"] = outputs.log_probs.new_zeros(())
            return outputs
        penalty = penalty.to(outputs.log_probs.device)
        outputs["aux_loss"] = penalty / (self.coefficient or 1.0)
        outputs["loss"] = outputs["loss"] + penalty * self._scale()
        return outputs

    def _scale(self) -> float:
        """Return the factor by which the trainer's own setting has changed the coefficient."""
        return float(self.text_config.router_aux_loss_coef / self.coefficient) if self.coefficient else 1.0


class FusedHeadLoss(RouterLoss):
    """The same on a `MixLoraForCausalLM`, for the calls of TRL's fused head only."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, MixtureOfLoraExperts)
        self.refresh()

    def _active_mixture(self) -> Any:
        return self.layers[0] if self.layers else None

    def _weights(self, mixture: Any) -> dict[str, float]:
        return router_loss_weights(self.model.config)

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super()._before(model, args, kwargs) if kwargs.get(FUSED_HEAD) else None


def register() -> None:
    """Let TRL's trainers add the router losses of every `MixLoraForCausalLM` that is made from now on."""
    if add_to not in INTEGRATIONS:
        INTEGRATIONS.append(add_to)


def add_to(model: Any) -> Callable[[], None]:
    """Add the hooks to a `MixLoraForCausalLM`, and return the function that removes them."""
    hooks = model.__dict__[ATTRIBUTE] = FusedHeadLoss(model)
    return hooks.remove


def _trl_adds_losses() -> bool:
    try:
        return Version(version("trl")) >= Version("1.16")
    except PackageNotFoundError:
        return False


def _add_to_enclosing(record: Any) -> None:
    """Add the routing of a call to the record of an enclosing `record_routing`."""
    around = current_record()
    if around is not None:
        for name in ("logits", "selected", "weights", "layers"):
            getattr(around, name).extend(getattr(record, name))


def _token_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    return mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def _add_to_loss(outputs: Any, penalty: Any) -> Any:
    if isinstance(outputs, tuple):
        return (outputs[0] + penalty.to(outputs[0].device), *outputs[1:])
    outputs["loss"] = outputs["loss"] + penalty.to(outputs["loss"].device)
    return outputs


def _with_routing(outputs: Any, losses: dict[str, Any], record: Any) -> Any:
    if isinstance(outputs, tuple):
        return outputs
    fields = {**outputs, **losses, "router_logits": tuple(record.logits)}
    fields.setdefault("aux_loss", torch.zeros(()))
    known = {name: value for name, value in fields.items() if name in MixLoraCausalLMOutput.__dataclass_fields__}
    return MixLoraCausalLMOutput(**known)


def _pass_mask_to_checkpoints(model: Any) -> None:
    """Make checkpointed layers see the padding again in backward, where switch routing needs it."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        given = getattr(function, "keywords", {})
        if function is not None and not given.get("use_reentrant") and "context_fn" not in given:
            module._gradient_checkpointing_func = partial(function, context_fn=checkpoint_contexts)
