"""The public models: MixLoRA and DoRA adapters in a base with and without its language-model head."""

import re
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from .adapted_model import AdaptedModel
from .configuration_minilora import DoraConfig, MixLoraConfig
from .routing import (
    checkpoint_contexts,
    is_being_trained,
    record_routing,
    router_loss_weights,
    router_losses,
    routing_of,
)


@dataclass
class MixLoraModelOutput(MoeModelOutputWithPast):
    """`MoeModelOutputWithPast` with the balance loss and, with `output_routing=True`, who served which token.

    Attributes:
        aux_loss: the load-balance loss, not yet multiplied by its coefficient.
        router_logits: per mixture, (batch, seq, experts), fp32.
        selected_experts: per mixture, (batch, seq, K), the most probable first. K is `num_experts_per_tok`, and the
            number of experts under ``routing_strategy="top_p"``, with -1 in the slots a token does not need. Under
            ``"switch"`` -1 is a token over its expert's capacity (in training only).
        routing_weights: per mixture, (batch, seq, K), fp32; 0 where the index is -1.
        z_loss: the router's z-loss, not yet multiplied by its coefficient; under ``"switch"`` only.
    """

    aux_loss: torch.FloatTensor | None = None
    selected_experts: tuple | None = None
    routing_weights: tuple | None = None
    z_loss: torch.FloatTensor | None = None


@dataclass
class MixLoraCausalLMOutput(MoeCausalLMOutputWithPast):
    """`MoeCausalLMOutputWithPast` with the z-loss and, for `output_routing=True`, who served which token (see
    `MixLoraModelOutput`).
    """

    selected_experts: tuple | None = None
    routing_weights: tuple | None = None
    z_loss: torch.FloatTensor | None = None


def share_of_items(labels, num_items_in_batch):
    """This micro-batch's share of an accumulated batch, so that the balance loss is averaged and not summed over it."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / num_items_in_batch


def _trl_adds_losses():
    """Whether a TRL is installed whose trainers add `outputs.aux_loss` themselves."""
    try:
        numbers = re.findall(r"\d+", version("trl"))
    except PackageNotFoundError:
        return False
    return [int(number) for number in numbers[:2]] >= [1, 16]


class AnnouncedMixture:
    """What TRL's trainers must see to add our router losses to the loss they compute, and to log them.

    They put a forward of their own in place of the model's, which calls decoder and head apart. From TRL 1.16 on they
    compute the loss from its log-probabilities, and where the base's configuration has the two fields that are set
    here, as those of transformers' mixtures have, they add ``router_aux_loss_coef * outputs.aux_loss``. (Before, they
    took the loss that comes out, so there is nothing to announce, and they would look for more than these fields.)

    Args:
        text_config: the base's configuration. It is changed.
        weights: weights of the router losses, from `router_loss_weights`.

    Attributes:
        coefficient: what was written into the configuration; None where nothing was.
    """

    FIELDS = ("output_router_logits", "router_aux_loss_coef")
    HEAD = "fused_lm_head"

    def __init__(self, text_config, weights):
        self.text_config, self.coefficient = text_config, None
        if weights and _trl_adds_losses() and not any(hasattr(text_config, field) for field in self.FIELDS):
            self.coefficient = weights.get("aux_loss", 1.0)
            text_config.output_router_logits, text_config.router_aux_loss_coef = False, self.coefficient

    def withdraw(self):
        """Leave the configuration as it was."""
        if self.coefficient is not None:
            for field in self.FIELDS:
                delattr(self.text_config, field)
        self.coefficient = None

    def scale(self):
        """How much the trainer's own setting has changed the coefficient."""
        return self.text_config.router_aux_loss_coef / self.coefficient if self.coefficient else 1.0

    def put_out(self, outputs, penalty):
        """The outputs of TRL's forward with `aux_loss`: the weighted losses, less the coefficient it will put to it."""
        if penalty is None:
            outputs["aux_loss"] = outputs.log_probs.new_zeros(())
            return outputs
        penalty = penalty.to(outputs.log_probs.device)
        outputs["aux_loss"] = penalty / (self.coefficient or 1.0)
        outputs["loss"] = outputs["loss"] + penalty * self.scale()
        return outputs


class MixtureForward:
    """The part of forward that MixLoRA adds: routing outputs and the balance loss."""

    def __init__(self, config, **kwargs):
        super().__init__(config, **kwargs)
        self.announced = AnnouncedMixture(self.base.config.get_text_config(), router_loss_weights(config))

    def __call__(self, *args, **kwargs):
        """Forward, or what a trainer has put in its place (see `AnnouncedMixture`)."""
        if "forward" not in self.__dict__:
            return super().__call__(*args, **kwargs)
        fused = kwargs.get(AnnouncedMixture.HEAD)
        if fused:
            kwargs["output_router_logits"] = False  # or it would look for them in the decoder's outputs
        mask = kwargs.get("attention_mask")
        with record_routing(mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None) as record:
            outputs = super().__call__(*args, **kwargs)
        weights, labels = router_loss_weights(self.config), kwargs.get("labels")
        if isinstance(outputs, (MixLoraCausalLMOutput, MixLoraModelOutput, tuple)):  # our own, in somebody's wrapper
            return outputs
        if not (weights and (fused or (self.training and labels is not None))):
            return self.announced.put_out(outputs, None) if fused else outputs
        losses = self._router_losses(record)
        penalty = sum(weight * losses[name] for name, weight in weights.items())
        if fused:
            return self.announced.put_out(outputs, penalty)
        outputs["loss"] = outputs["loss"] + penalty * share_of_items(labels, kwargs.get("num_items_in_batch"))
        return outputs

    def unload(self):
        self.announced.withdraw()
        return super().unload()

    def _forward(
        self, output_class, input_ids, attention_mask, output_router_logits, output_routing, return_dict, kwargs
    ):
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        labels = kwargs.get("labels")
        weights = router_loss_weights(self.config) if self.training and labels is not None else {}
        tell_padding = self.training and routing_of(self.config).needs_token_mask
        if not (output_router_logits or output_routing or weights or tell_padding):
            outputs, routing = (
                self.base(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs),
                {},
            )
        else:
            is_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2
            with record_routing(attention_mask if is_mask else None) as record:
                outputs = self.base(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
            routing = self._router_losses(record) if output_router_logits or weights else {}
            if output_router_logits:
                routing["router_logits"] = tuple(record.logits)
            if output_routing:
                routing["selected_experts"] = tuple(record.selected)
                routing["routing_weights"] = tuple(record.weights)
        fields = {**outputs, **routing}
        if weights:
            share = share_of_items(labels, kwargs.get("num_items_in_batch"))
            penalty = sum(weight * routing[name] for name, weight in weights.items()) * share
            fields["loss"] = fields["loss"] + penalty.to(fields["loss"].device)
        known = {name: fields[name] for name in fields if name in output_class.__dataclass_fields__}
        result = output_class(**known)
        return result if return_dict is not False else result.to_tuple()

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, *args, **kwargs):
        """What is padding goes along with a checkpointed layer, where the routing depends on it."""
        given = getattr(gradient_checkpointing_func, "keywords", {})
        if routing_of(self.config).needs_token_mask and not given.get("use_reentrant") and "context_fn" not in given:
            gradient_checkpointing_func = partial(gradient_checkpointing_func, context_fn=checkpoint_contexts)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)

    def _router_losses(self, record):
        router = next(p for name, p in self.adapter_parameters().items() if name.endswith(".router"))
        return router_losses(record, routing_of(self.config), is_being_trained(self, router))


class GenerateOnBase:
    """Generation is the base's own: the adapter sits in it, so its cache, settings and peculiarities all apply."""

    def generate(self, *args, **kwargs):
        return self.base.generate(*args, **kwargs)

    @property
    def generation_config(self):
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, value):
        if "base" in self._modules:  # transformers sets a default one before there is a base
            self.base.generation_config = value

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return self.base.prepare_inputs_for_generation(*args, **kwargs)


class DoraModel(AdaptedModel):
    """A base without its language-model head, with a DoRA adapter (arXiv 2402.09353) in it."""

    config_class = DoraConfig
    auto_class = AutoModel


class DoraForCausalLM(GenerateOnBase, AdaptedModel, GenerationMixin):
    """A causal language model with a DoRA adapter (arXiv 2402.09353) in it."""

    config_class = DoraConfig
    auto_class = AutoModelForCausalLM

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        """The base's forward, with the adapter in it: same arguments, same outputs."""
        return self.base(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


class MixLoraModel(MixtureForward, AdaptedModel):
    """A base without its language-model head, with a MixLoRA adapter (arXiv 2404.15159) in it."""

    config_class = MixLoraConfig
    auto_class = AutoModel

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        output_router_logits=None,
        output_routing=False,
        return_dict=None,
        **kwargs,
    ):
        """The base's forward plus routing outputs: see `MixLoraForCausalLM.forward`."""
        return self._forward(
            MixLoraModelOutput, input_ids, attention_mask, output_router_logits, output_routing, return_dict, kwargs
        )


class MixLoraForCausalLM(MixtureForward, GenerateOnBase, AdaptedModel, GenerationMixin):
    """A causal language model with a MixLoRA adapter (arXiv 2404.15159) in it."""

    config_class = MixLoraConfig
    auto_class = AutoModelForCausalLM

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        labels=None,
        output_router_logits=None,
        output_routing=False,
        return_dict=None,
        **kwargs,
    ):
        """The base's forward plus routing outputs.

        Args:
            input_ids: (batch, seq).
            attention_mask: (batch, seq), 0 on padding, which does not count in the balance loss.
            labels: (batch, seq), -100 where there is no loss. In training the balance loss times its coefficient is
                added.
            output_router_logits: also return `router_logits` and `aux_loss`. Default: the configuration's.
            output_routing: also return `selected_experts` and `routing_weights`.
            return_dict: False for a tuple.
            **kwargs: the base's other arguments.

        Returns:
            MixLoraCausalLMOutput.
        """
        if labels is not None:
            kwargs["labels"] = labels
        return self._forward(
            MixLoraCausalLMOutput, input_ids, attention_mask, output_router_logits, output_routing, return_dict, kwargs
        )
