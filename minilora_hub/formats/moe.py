"""A MixLoRA as a checkpoint of a mixture-of-experts architecture of transformers, which needs no code of ours.

Every expert is a whole feed-forward block with its own weights written out, W + s B_e A_e (or DoRA's
c_e * (W + s B_e A_e)), the router is the same, and the adapter on attention merges into the weights. These
architectures route as MixLoRA's top_k does: softmax, the k largest, divided by their sum. So the outputs are the same
up to rounding. An architecture is named here only where every other part of its layer is the base's own:

    llama, mistral   Mixtral       without biases
    qwen2            Qwen2Moe      its shared expert, which MixLoRA has none of, is written as zeros: it adds 0 exactly
    qwen3            Qwen3Moe      with one kind of attention in all layers
    olmo2            FlexOlmo
    granite          GraniteMoe    without biases in the feed-forward block

The checkpoint is written layer by layer, each its own shard: beside the base and the adapter, one layer is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.companions import write_companions
from minilora_hub.adapter_folder.writing import require_free, whole_folder
from minilora_hub.bases.skeleton import BaseSource, hub_name
from minilora_hub.errors import AdapterError
from minilora_hub.formats.checkpoint import require_space, write_card, write_shards
from minilora_hub.formats.moe_architectures import (
    ARCHITECTURES,
    GRANITE_MOE,
    NOT_FITTING,
    QWEN2_MOE,
    QWEN3_MOE,
    SHARED,
    ZERO_WIDTH,
    Architecture,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MoePlan:
    """What an export will write, before it does.

    Attributes:
        architecture: where it goes.
        config: the configuration of the checkpoint.
        shards: number of files with tensors.
        bytes_on_disk: of all tensors.
        bytes_of_largest_shard: of the one that is in memory beside the base and the adapter.
        bytes_of_model: of the base and the adapter, which are in memory all along.
    """

    architecture: Architecture
    config: Any
    shards: int
    bytes_on_disk: int
    bytes_of_largest_shard: int
    bytes_of_model: int


def plan_moe(model: Any, only: str | None = None) -> MoePlan:
    """Say what `model`, a `MixLoraForCausalLM`, becomes.

    Args:
        model: the adapter on its base.
        only: the class it must become, e.g. ``"MixtralForCausalLM"``. Default: its family's own.

    Raises:
        AdapterError: there is no architecture that computes the same; the message says why.
    """
    config = moe_config(model, only)
    architecture = ARCHITECTURES[model.base.config.model_type]
    base, count = model.base, model.config.num_experts
    outside = sum(tensor.nbytes for tensor in _outside(base).values())
    size = base.dtype.itemsize
    layers = [
        size * (sum(_numel(layer, name, count) for name in ("attention and norms", "experts")))
        for layer in _layers(base)
    ]
    if architecture is QWEN2_MOE:
        shared = size * (3 * ZERO_WIDTH + 1) * base.config.hidden_size
        layers = [layer + shared for layer in layers]
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return MoePlan(architecture, config, len(layers) + 1, outside + sum(layers), max(outside, *layers), held)


def export_moe(
    model: Any,
    out: str | Path,
    *,
    companions: Path | None = None,
    base: BaseSource | None = None,
    only: str | None = None,
    progress: Any = None,
) -> list[str]:
    """Write a MixLoRA as a native mixture-of-experts checkpoint.

    Args:
        model: a `MixLoraForCausalLM`. It is left as it is.
        out: the folder, which must be empty or not there yet. It appears whole or not at all.
        companions: the adapter's folder, whose tokenizer, chat template and generation settings are copied.
        base: the base, whose tokenizer is written where the adapter has none.
        only: the class it must become. Default: the one of the base's family.
        progress: called with (shards written, shards in all).

    Returns:
        What the user should know, a line each.

    Raises:
        AdapterError: no architecture computes the same, the folder is not empty, or the disk is too full. Nothing is
            written then.
    """
    require_free(out)
    plan = plan_moe(model, only)
    require_space(out, plan.bytes_on_disk)
    with whole_folder(out) as folder:
        write_shards(folder, _parts(model, plan, progress), plan.shards)
        plan.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        notes = [] if companions is None else write_companions(folder, companions, base)
        _write_card(folder, model, plan)
    return notes


def moe_config(model: Any, only: str | None = None) -> Any:
    """Return the configuration that describes `model`; an AdapterError says why there is none."""
    import transformers

    from minilora_hub.remote_code.mixture import MixtureOfLoraExperts

    text, ours = model.base.config, model.config
    if ours.model_type != "mixlora":
        raise AdapterError(f"model_type={ours.model_type!r}: only a MixLoRA is a mixture; a DoRA merges into its base")
    if ours.routing_strategy != "top_k":
        raise AdapterError(
            f"routing_strategy={ours.routing_strategy!r}: these architectures take the k largest experts and divide by "
            "their sum, so only top_k can be exported"
        )
    architecture = ARCHITECTURES.get(text.model_type)
    if architecture is None:
        known = ", ".join(f"{family} ({which.name})" for family, which in ARCHITECTURES.items())
        reason = NOT_FITTING.get(text.model_type, "no architecture is known to compute the same")
        raise AdapterError(f"base of type {text.model_type!r}: {reason}; what fits is {known}")
    if only is not None and architecture.name != only:
        fitting = [family for family, which in ARCHITECTURES.items() if which.name == only]
        raise AdapterError(
            f"base of type {text.model_type!r}: {only} is a {' or '.join(fitting)} in every other layer; "
            f"it fits {architecture.name} (--to moe)"
        )
    for name in architecture.biases:
        if getattr(text, name, False):
            raise AdapterError(f"base with {name}=True: {architecture.name} has no such biases")
    require_plain(model)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if architecture is QWEN3_MOE and len(kinds) > 1:
        raise AdapterError(f"base with layer_types {sorted(kinds)}: {architecture.name} has one kind for all layers")
    if sum(isinstance(module, MixtureOfLoraExperts) for module in model.modules()) != text.num_hidden_layers:
        raise AdapterError(f"a {architecture.name} has experts in every layer, this adapter has not")
    fields = [*SHARED.split(), *architecture.fields.split()]
    config = getattr(transformers, architecture.config)(
        **{name: getattr(text, name) for name in fields if hasattr(text, name)},
        **architecture.own(ours, text),
        num_experts_per_tok=ours.num_experts_per_tok,
        router_aux_loss_coef=ours.router_aux_loss_coef,
        dtype=model.base.dtype,
    )
    config.architectures = [architecture.name]
    return config


def require_plain(model: Any) -> None:
    """Raise an AdapterError where a linear of the base does not lie open in memory: it cannot be written out."""
    from minilora_hub.remote_code.linear_layers import linear_shape, plain_weight

    for path, layer in model.base.named_modules():
        if linear_shape(layer) and not hasattr(layer, "base_layer") and plain_weight(layer) is None:
            kind = type(layer).__name__
            raise AdapterError(
                f"the base's {path} is a {kind}: load the base without quantisation or offload to export"
            )


def _layers(base: Any) -> Any:
    from minilora_hub.remote_code.base_structure import find_decoder_layers

    return find_decoder_layers(base)[1]


def _outside(base: Any) -> dict[str, torch.Tensor]:
    """Embeddings, the last norm and the head, each once: tied ones are in the file under one name."""
    return {name: tensor.detach() for name, tensor in base.named_parameters() if ".layers." not in name}


def _numel(layer: Any, what: str, experts: int) -> int:
    mixture = _mixture(layer)
    inside = sum(parameter.numel() for parameter in mixture.base_block.parameters())
    if what == "experts":
        return experts * inside + int(mixture.router.numel())
    from minilora_hub.remote_code.adapted_linear import LowRankUpdate

    adapter = sum(
        parameter.numel()
        for module in layer.modules()
        if isinstance(module, LowRankUpdate)
        for parameter in module.parameters()
    )
    return sum(parameter.numel() for parameter in layer.parameters()) - adapter - inside - int(mixture.router.numel())


def _mixture(layer: Any) -> Any:
    from minilora_hub.remote_code.mixture import MixtureOfLoraExperts

    return next(module for module in layer.modules() if isinstance(module, MixtureOfLoraExperts))


def _parts(model: Any, plan: MoePlan, progress: Any) -> Iterator[dict[str, torch.Tensor]]:
    report = progress or (lambda done, total: None)
    yield {name: tensor.contiguous() for name, tensor in _outside(model.base).items()}
    for index, layer in enumerate(_layers(model.base)):
        report(index + 1, plan.shards)
        yield _layer_tensors(layer, f"model.layers.{index}", plan.architecture, model.base.dtype)
    report(plan.shards, plan.shards)


def _layer_tensors(layer: Any, prefix: str, architecture: Architecture, dtype: Any) -> dict[str, torch.Tensor]:
    """Every tensor of one layer under the architecture's names on disk."""
    import torch

    from minilora_hub.remote_code.adapted_linear import AdaptedLinear
    from minilora_hub.remote_code.mixture import MixtureOfLoraExperts

    tensors = {}
    with torch.no_grad():
        adapted = {name: module for name, module in layer.named_modules() if isinstance(module, AdaptedLinear)}
        mixtures = [name for name, module in layer.named_modules() if isinstance(module, MixtureOfLoraExperts)]
        for name, parameter in layer.named_parameters():
            owner = next((path for path in (*adapted, *mixtures) if name.startswith(f"{path}.")), None)
            if owner is None:
                tensors[f"{prefix}.{name}"] = parameter
            elif name.endswith(".base_layer.bias"):
                tensors[f"{prefix}.{owner}.bias"] = parameter
        for path, module in adapted.items():
            tensors[f"{prefix}.{path}.weight"] = module.merged_weight()
        mixture = _mixture(layer)
        block = f"{prefix}.{architecture.block}"
        tensors[f"{block}.{architecture.router}"] = mixture.router.to(dtype)
        gate, up = (_expert_weights(mixture, name) for name in mixture.structure.inputs)  # each (ff, d) an expert
        down = _expert_weights(mixture, mixture.structure.output)  # (d, ff) an expert
        names = architecture.experts
        if architecture is GRANITE_MOE:
            pairs = zip(gate, up, strict=True)
            tensors[f"{block}.{names[0]}"] = torch.stack([torch.cat(pair) for pair in pairs])
            tensors[f"{block}.{names[2]}"] = torch.stack(list(down))
        else:
            for weights, name in zip((gate, up, down), names, strict=True):
                for expert, weight in enumerate(weights):
                    tensors[f"{block}.{name.format(expert)}"] = weight
        if architecture is QWEN2_MOE:
            width = mixture.router.shape[1]
            for name, shape in {
                "shared_expert.gate_proj": (ZERO_WIDTH, width),
                "shared_expert.up_proj": (ZERO_WIDTH, width),
                "shared_expert.down_proj": (width, ZERO_WIDTH),
                "shared_expert_gate": (1, width),
            }.items():
                tensors[f"{block}.{name}.weight"] = torch.zeros(shape, dtype=dtype)
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _expert_weights(mixture: Any, name: str) -> Iterator[torch.Tensor]:
    """The weights of each expert's projection, written out: (out, in)."""
    layer = mixture.base_block.get_submodule(name)
    weight = layer.weight
    update = dict(mixture.experts.items()).get(name)
    scale = update.scale(layer) if update is not None and update.magnitude is not None else None
    for expert in range(mixture.router.shape[0]):
        if update is None:
            yield weight.clone()  # a tensor in a file shares its memory with no other
            continue
        whole = weight.float() + update.scaling * (update.lora_B[expert].float() @ update.lora_A[expert].float())
        yield (whole if scale is None else whole * scale[expert].unsqueeze(-1)).to(weight.dtype)


def _write_card(folder: Path, model: Any, plan: MoePlan) -> None:
    ours = model.config
    named = hub_name(ours.base_model_name_or_path) or "a local folder"
    lines = [
        f"A MixLoRA adapter with {ours.num_experts} experts, {ours.num_experts_per_tok} of them active, written out as "
        f"a native `{plan.architecture.name}` by `minilora export`. It needs no remote code, and computes what the "
        "adapter computes on its base, up to rounding.",
        f"Base: `{named}`. What the base's and the adapter's licences allow holds here, too.",
    ]
    snippet = (
        'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("this/repo")'
    )
    facts = {
        "base_model": hub_name(ours.base_model_name_or_path),
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixlora", "mixture-of-experts", "minilora-export"],
    }
    write_card(folder, "A MixLoRA as a mixture of experts", facts, lines, snippet)
