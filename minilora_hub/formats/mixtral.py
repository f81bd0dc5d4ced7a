"""A MixLoRA as a native Mixtral checkpoint, which needs no code of ours.

Every expert is a whole feed-forward block with its own weights written out, W + s B_e A_e (or DoRA's
c_e * (W + s B_e A_e)), the router is the same, and the adapter on attention merges into the weights. Mixtral routes as
MixLoRA does: softmax, the k largest, divided by their sum. So the outputs are the same up to rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minilora_hub.errors import AdapterError
from minilora_hub.remote_code.adapted_linear import AdaptedLinear, plain_weight
from minilora_hub.remote_code.mixture import MixtureOfLoraExperts

BASES = ("llama", "mistral")
"""Model types whose decoder layer is Mixtral's, apart from the feed-forward block."""

SHARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id "
    "eos_token_id tie_word_embeddings sliding_window attention_dropout rope_parameters"
)
"""What Mixtral's configuration takes from the base's."""


def export_mixtral(model: Any, out: str | Path, tokenizer: Any = None) -> Path:
    """Write a MixLoRA as a `MixtralForCausalLM` checkpoint.

    Args:
        model: a `MixLoraForCausalLM`. It is left as it is.
        out: the folder, which must be empty or not there yet.
        tokenizer: saved beside the weights where given.

    Returns:
        The folder.

    Raises:
        AdapterError: the base is not one that Mixtral can hold, or the folder is not empty. Nothing is written then.
    """
    from transformers import MixtralForCausalLM

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"out={str(out)!r}: must be a folder that is empty, or not there yet")
    config = mixtral_config(model)
    with torch.device("meta"):
        exported = MixtralForCausalLM(config)
    exported.load_state_dict(mixtral_tensors(model), strict=True, assign=True)
    exported.generation_config = model.generation_config
    exported.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return out


def mixtral_config(model: Any) -> Any:
    """Return the MixtralConfig that describes `model`; an AdapterError says why there is none."""
    from transformers import MixtralConfig

    text, ours = model.base.config, model.config
    if ours.model_type != "mixlora":
        raise AdapterError(f"model_type={ours.model_type!r}: only a MixLoRA is a Mixtral; a DoRA merges into its base")
    if ours.routing_strategy != "top_k":
        raise AdapterError(
            f"routing_strategy={ours.routing_strategy!r}: a Mixtral takes the k best experts of each token and divides "
            'their weights by their sum, which is "top_k" only'
        )
    if text.model_type not in BASES:
        raise AdapterError(
            f"base of type {text.model_type!r}: a Mixtral is a {' or '.join(BASES)} in every other layer"
        )
    for name in ("attention_bias", "mlp_bias"):
        if getattr(text, name, False):
            raise AdapterError(f"base with {name}=True: Mixtral has no biases")
    if sum(isinstance(module, MixtureOfLoraExperts) for module in model.modules()) != text.num_hidden_layers:
        raise AdapterError("a Mixtral has experts in every layer, this adapter has not")
    shared = SHARED.split()
    return MixtralConfig(
        **{name: getattr(text, name) for name in shared if hasattr(text, name)},
        num_local_experts=ours.num_experts,
        num_experts_per_tok=ours.num_experts_per_tok,
        router_aux_loss_coef=ours.router_aux_loss_coef,
        dtype=model.base.dtype,
    )


@torch.no_grad()
def mixtral_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return every tensor of the checkpoint under Mixtral's names."""
    base, tensors = model.base, {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if ".layers." not in name:
            tensors[name] = parameter
    for index, layer in enumerate(base.model.layers):
        prefix = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = getattr(layer, norm).weight
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            adapted = isinstance(linear, AdaptedLinear)
            tensors[f"{prefix}.self_attn.{name}.weight"] = linear.merged_weight() if adapted else linear.weight
        mixture = layer.mlp
        gate, up = (_expert_weights(mixture, name) for name in mixture.structure.inputs)  # (experts, ff, d)
        tensors[f"{prefix}.mlp.experts.gate_up_proj"] = torch.cat((gate, up), dim=1)
        tensors[f"{prefix}.mlp.experts.down_proj"] = _expert_weights(mixture, mixture.structure.output)
        tensors[f"{prefix}.mlp.gate.weight"] = mixture.router.to(base.dtype)
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _expert_weights(mixture: MixtureOfLoraExperts, name: str) -> torch.Tensor:
    """The weights of every expert's projection, written out: (experts, out, in)."""
    layer = mixture.base_block.get_submodule(name)
    weight = plain_weight(layer)
    if weight is None:
        raise AdapterError(
            f"the base's {name} is a {type(layer).__name__}: load the base without quantisation to export"
        )
    whole = weight.float().expand(mixture.router.shape[0], *weight.shape)
    if name in mixture.experts:
        update = mixture.experts[name]
        whole = whole + update.scaling * (update.lora_B.float() @ update.lora_A.float())
        if update.magnitude is not None:
            whole = whole * update.scale(layer).unsqueeze(-1)
    return whole.to(weight.dtype)
