"""MixLoRA in a model: its outputs of the routers, and the balance loss."""

from collections.abc import Callable
from dataclasses import field, make_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .adapted_model import AdaptedModel
from .heads import CAUSAL
from .layer_stacks import reads_tokens
from .routing import router_loss_weights, router_losses, routing_of
from .routing_record import RoutingRecord, checkpoint_contexts, record_routing
from .trainer_support import takes_base_arguments

ROUTING_FIELDS = ("aux_loss", "router_logits", "selected_experts", "routing_weights", "z_loss")
"""Fields of a MixLoRA's outputs, None where they were not asked for.

aux_loss, z_loss: the load-balance loss and, under ``"switch"``, the router's z-loss, without their coefficients.
router_logits, selected_experts, routing_weights: a tensor per mixture, see `RoutingRecord`. K is `num_experts_per_tok`,
    and the number of experts under ``routing_strategy="top_p"``.
"""
_WITH_ROUTING: dict[Any, Any] = {}  # no functools.cache, past which torch.compile looks


def with_routing(output_class: Any, name: str | None = None) -> Any:
    """Return a base's class of outputs with `ROUTING_FIELDS` beside its own, called `name` where it is kept here."""
    if output_class not in _WITH_ROUTING:
        have = output_class.__dataclass_fields__
        added = [(field_name, object, field(default=None)) for field_name in ROUTING_FIELDS if field_name not in have]
        made = make_dataclass(name or f"MixLora{output_class.__name__}", added, bases=(output_class,))
        made.__module__ = __name__
        _WITH_ROUTING[output_class] = made
    return _WITH_ROUTING[output_class]


MixLoraModelOutput = with_routing(MoeModelOutputWithPast, "MixLoraModelOutput")
MixLoraCausalLMOutput = with_routing(MoeCausalLMOutputWithPast, "MixLoraCausalLMOutput")


def share_of_items(labels: Any, num_items_in_batch: Any, shifted: bool = True) -> Any:
    """Return a micro-batch's share of an accumulated batch, over which the balance loss is averaged, not summed."""
    if num_items_in_batch is None:
        return 1.0
    return ((labels[..., 1:] if shifted else labels) != -100).sum() / num_items_in_batch


INTEGRATIONS: list[Callable[[Any], Callable[[], None]]] = []
"""Functions that are called with each new MixLoRA and return a function that undoes their changes to it and its base.

minilora_hub adds one for trainers that do not take the loss from the model's outputs.
"""


class MixLoraBase(AdaptedModel):
    """What MixLoRA adds to an adapted model: routing outputs and the balance loss."""

    output_class: Any = None

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        # Of the names of the arguments that hold the tokens of the routed layers.
        self._prefix = "decoder_" if any(site.name.startswith("decoder.") for site in self.sites) else ""
        self._reads_tokens = reads_tokens(self.base, self.sites[0].path)
        self._enter_integrations()

    def _enter_integrations(self) -> None:
        self._leave_integrations = [enter(self) for enter in INTEGRATIONS]

    def unload(self) -> Any:
        for leave in self._leave_integrations:
            leave()
        return super().unload()

    def save_base(self, folder: Any, **kwargs: Any) -> None:
        for leave in self._leave_integrations:  # the base's configuration is saved, without what they put into it
            leave()
        try:
            super().save_base(folder, **kwargs)
        finally:
            self._enter_integrations()

    @takes_base_arguments
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The base's forward plus routing outputs.

        Args:
            input_ids: (batch, seq).
            *args: the base's other arguments, in its order.
            output_router_logits: also return `router_logits` and `aux_loss`. Default: the configuration's.
            output_routing: also return `selected_experts` and `routing_weights`.
            **kwargs: the base's other arguments, among them `labels`, with which the balance loss times its coefficient
                is added in training, and `attention_mask`, (batch, seq), 0 on padding, which does not count in it.

        Returns:
            `output_class`, or the base's own outputs with `ROUTING_FIELDS`; a tuple with ``return_dict=False``.
        """
        arguments = self._base_arguments(input_ids, args, kwargs)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        return_dict, arguments["return_dict"] = arguments.get("return_dict"), True
        labels = arguments.get("labels")
        labels = arguments.get("start_positions") if labels is None else labels
        weights = router_loss_weights(self.config) if self.training and labels is not None else {}
        needs_padding = self.training and routing_of(self.config).needs_token_mask
        if not (output_router_logits or output_routing or weights or needs_padding):
            outputs: Any = self.base(**arguments)
            routing: dict[str, Any] = {}
        else:
            with record_routing(*self._mask_and_shape(arguments)) as record:
                outputs = self.base(**arguments)
            routing = self._router_losses(record) if output_router_logits or weights else {}
            if output_router_logits:
                routing["router_logits"] = tuple(record.logits)
            if output_routing:
                routing |= {"selected_experts": tuple(record.selected), "routing_weights": tuple(record.weights)}
        fields = {**outputs, **routing}
        if weights:
            shifted = self.auto_class.__name__ in CAUSAL
            share = share_of_items(labels, arguments.get("num_items_in_batch"), shifted)
            penalty = sum(weight * routing[name] for name, weight in weights.items()) * share
            fields["loss"] = fields["loss"] + penalty.to(fields["loss"].device)
        fits = self.output_class and fields.keys() <= self.output_class.__dataclass_fields__.keys()
        result = (self.output_class if fits else with_routing(type(outputs)))(**fields)
        return result if return_dict is not False else result.to_tuple()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, *args: Any, **kwargs: Any
    ) -> None:
        """Make the padding known to checkpointed layers, where the routing depends on it."""
        given = getattr(gradient_checkpointing_func, "keywords", {})
        if routing_of(self.config).needs_token_mask and not given.get("use_reentrant") and "context_fn" not in given:
            gradient_checkpointing_func = partial(gradient_checkpointing_func, context_fn=checkpoint_contexts)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)

    def _mask_and_shape(self, arguments: dict[str, Any]) -> tuple[Tensor | None, torch.Size | None]:
        """The (batch, seq) mask of the tokens that are routed, and their shape, as far as the arguments tell them.

        The mask of a sound is one of samples, and that of a text beside a picture is not one of the picture's parts.
        """
        if not self._reads_tokens:
            return None, None
        names = ("attention_mask", "input_ids", "inputs_embeds")
        mask, *tokens = (arguments.get(self._prefix + name) for name in names)
        shape = next((given.shape[:2] for given in tokens if given is not None), None)
        return mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None, shape

    def _router_losses(self, record: RoutingRecord) -> dict[str, Any]:
        router = next(p for name, p in self.adapter_parameters().items() if name.endswith(".router"))
        trained = self.training and torch.is_grad_enabled() and router.requires_grad
        return router_losses(record, routing_of(self.config), trained)
