"""Write a MixLoRA as a checkpoint of one of transformers' mixture-of-experts architectures, without adapter code.

Every expert is a whole feed-forward block with its own weights written out, W + s B_e A_e (or DoRA's
c_e * (W + s B_e A_e)), the router is the same, and the adapter on attention merges into the weights. These
architectures route as MixLoRA's top_k does: softmax, the k largest, divided by their sum. So the outputs are the same
up to rounding. An architecture is named here only where every other part of its layer is the base's own:

    llama, mistral   Mixtral       without biases
    qwen2            Qwen2Moe      its shared expert, which MixLoRA has none of, is written as zeros: it adds 0 exactly
    qwen3            Qwen3Moe      with one kind of attention in all layers
    olmo2            FlexOlmo
    granite          GraniteMoe    without biases in the feed-forward block

The checkpoint is written with one shard per layer, so that besides base and adapter only one layer is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilora_hub.adapter_folder.companions import write_companions
from minilora_hub.adapter_folder.folders import only_ours
from minilora_hub.bases.skeleton import BaseSource, hub_name, skeleton
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
from minilora_hub.remote_code.adapted_linear import AdaptedLinear
from minilora_hub.remote_code.layer_stacks import find_decoder_layers
from minilora_hub.remote_code.linear_layers import linear_shape, plain_weight
from minilora_hub.remote_code.mixture import MixtureOfLoraExperts
from minilora_hub.whole_folders import require_free, whole_folder


@dataclass(frozen=True)
class MoePlan:
    """The checkpoint that an export will write.

    Attributes:
        architecture: the target.
        config: the configuration of the checkpoint.
        shards: number of files with tensors.
        bytes_on_disk: of all tensors.
        bytes_of_largest_shard: of the shard that is in memory together with the base and the adapter.
        bytes_of_model: of the base and the adapter, which stay in memory.
    """

    architecture: Architecture
    config: Any
    shards: int
    bytes_on_disk: int
    bytes_of_largest_shard: int
    bytes_of_model: int


def plan_moe(model: Any, only: str | None = None) -> MoePlan:
    """Return the plan for exporting a `MixLoraForCausalLM`.

    Args:
        model: the adapter on its base.
        only: the required class, e.g. ``"MixtralForCausalLM"``. Default: the class for the base's family.

    Raises:
        AdapterError: no architecture computes the same outputs; the message says why.
    """
    config = moe_config(model, only)
    outcome = skeleton(config, blocks=False)
    size = model.base.dtype.itemsize
    total = size * _count(outcome)
    layers = [size * _count(layer) for layer in find_decoder_layers(outcome)[1]]
    largest = max(total - sum(layers), *layers)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    architecture = ARCHITECTURES[model.base.config.model_type]
    return MoePlan(architecture, config, len(layers) + 1, total, largest, held)


def export_moe(
    model: Any,
    out: str | Path,
    companions: Path | None = None,
    base: BaseSource | None = None,
    *,
    only: str | None = None,
    announce: Callable[[MoePlan], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write a MixLoRA as a native mixture-of-experts checkpoint.

    Args:
        model: a `MixLoraForCausalLM`, which is not changed.
        out: an empty folder, or one that does not exist. It is written completely or not at all.
        companions: the adapter's folder, whose tokenizer, chat template and generation settings are copied.
        base: the base, whose tokenizer is written where the adapter has none.
        only: the required class. Default: the class for the base's family.
        announce: called with the plan before anything is written.
        progress: called with (shards written, total shards).

    Returns:
        Notes for the user, one line each.

    Raises:
        AdapterError: no architecture computes the same outputs, the folder is not empty, or there is not enough disk
            space. Nothing is written then.
    """
    require_free(out)
    plan = plan_moe(model, only)
    if announce is not None:
        announce(plan)
    require_space(out, plan.bytes_on_disk)
    with whole_folder(out) as folder:
        write_shards(folder, _parts(model, plan, progress), plan.shards)
        plan.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        notes = [] if companions is None else write_companions(folder, companions, base)
        text = (
            f"A MixLoRA adapter with {model.config.num_experts} experts, {model.config.num_experts_per_tok} of them "
            f"active, written out as a native `{plan.architecture.name}` by `minilora export`. It needs no remote "
            "code, and computes what the adapter computes on its base, up to rounding."
        )
        named = hub_name(model.config.base_model_name_or_path)
        write_card(folder, "A MixLoRA as a mixture of experts", text, named, ["mixlora", "mixture-of-experts"])
    return notes


def moe_config(model: Any, only: str | None = None) -> Any:
    """Return the configuration that describes `model`; raise AdapterError if there is none."""
    mixtures = sum(isinstance(module, MixtureOfLoraExperts) for module in model.modules())
    config = config_as_moe(model.config, model.base.config, mixtures, model.base.dtype, only)
    require_plain(model)
    return config


def config_as_moe(ours: Any, text: Any, mixtures: int, dtype: Any, only: str | None = None) -> Any:
    """Return the configuration of the mixture-of-experts model that computes the same as a MixLoRA on its base.

    Args:
        ours: the adapter's configuration.
        text: the base's configuration.
        mixtures: number of layers with experts.
        dtype: dtype of the weights.
        only: the class that is required. Default: the one of the base's family.

    Raises:
        AdapterError: no architecture computes the same; the message says why.
    """
    import transformers

    if ours.model_type != "mixlora":
        raise AdapterError(f"model_type={ours.model_type!r}: only a MixLoRA is a mixture; a DoRA merges into its base")
    if ours.routing_strategy != "top_k":
        raise AdapterError(
            f"routing_strategy={ours.routing_strategy!r}: these architectures take the k largest experts and divide by "
            "their sum, so only top_k can be exported"
        )
    if field := only_ours(vars(ours)):
        raise AdapterError(f"{field}: these architectures have the same number of experts in each feed-forward block")
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
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if architecture is QWEN3_MOE and len(kinds) > 1:
        raise AdapterError(f"base with layer_types {sorted(kinds)}: {architecture.name} has one kind for all layers")
    if mixtures != text.num_hidden_layers:
        raise AdapterError(f"a {architecture.name} has experts in every layer, this adapter does not")
    fields = [*SHARED.split(), *architecture.fields.split()]
    config = getattr(transformers, architecture.config)(
        **{name: getattr(text, name) for name in fields if hasattr(text, name)},
        **architecture.own(ours, text),
        num_experts_per_tok=ours.num_experts_per_tok,
        router_aux_loss_coef=ours.router_aux_loss_coef,
        dtype=dtype,
    )
    config.architectures = [architecture.name]
    return config


def require_plain(model: Any) -> None:
    """Raise AdapterError if a linear of the base is quantised or offloaded, so that it cannot be written."""
    for path, layer in model.base.named_modules():
        if linear_shape(layer) and not hasattr(layer, "base_layer") and plain_weight(layer) is None:
            kind = type(layer).__name__
            raise AdapterError(
                f"the base's {path} is a {kind}: load the base without quantisation or offload to export"
            )


def _outside(base: Any) -> dict[str, torch.Tensor]:
    """Return embeddings, final norm and head; tied weights are stored once."""
    return {name: tensor.detach() for name, tensor in base.named_parameters() if ".layers." not in name}


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parts(model: Any, plan: MoePlan, progress: Any) -> Iterator[dict[str, torch.Tensor]]:
    report = progress or (lambda done, total: None)
    yield {name: tensor.contiguous() for name, tensor in _outside(model.base).items()}
    for index, layer in enumerate(find_decoder_layers(model.base)[1]):
        report(index + 1, plan.shards)
        yield _layer_tensors(layer, f"model.layers.{index}", plan.architecture, model.base.dtype)
    report(plan.shards, plan.shards)


def _layer_tensors(layer: Any, prefix: str, architecture: Architecture, dtype: Any) -> dict[str, torch.Tensor]:
    """Return every tensor of one layer under the architecture's names on disk."""
    tensors: dict[str, torch.Tensor] = {}
    done: list[str] = []  # paths of adapted modules, whose parts are in their merged weights
    with torch.no_grad():
        for path, module in layer.named_modules(prefix=prefix):
            if any(path.startswith(f"{finished}.") for finished in done):
                continue
            if isinstance(module, AdaptedLinear):
                done.append(path)
                tensors[f"{path}.weight"] = module.merged_weights()["weight"]
                if module.base_layer.bias is not None:
                    tensors[f"{path}.bias"] = module.base_layer.bias  # type: ignore[assignment]
            elif isinstance(module, MixtureOfLoraExperts):
                done.append(path)
                block = _mixture_tensors(module, architecture, dtype)
                tensors |= {f"{prefix}.{architecture.block}.{name}": tensor for name, tensor in block.items()}
            else:
                tensors |= module.named_parameters(path, recurse=False)
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _mixture_tensors(mixture: Any, architecture: Architecture, dtype: Any) -> dict[str, torch.Tensor]:
    tensors = {architecture.router: mixture.router.to(dtype)}
    gate, up = (_expert_weights(mixture, name) for name in mixture.structure.inputs)  # each (ff, d) an expert
    down = _expert_weights(mixture, mixture.structure.output)  # (d, ff) an expert
    names = architecture.experts
    if architecture is GRANITE_MOE:
        tensors[names[0]] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        tensors[names[2]] = torch.stack(list(down))
    else:
        for weights, name in zip((gate, up, down), names, strict=True):
            tensors |= {name.format(expert): weight for expert, weight in enumerate(weights)}
    if architecture is QWEN2_MOE:
        tensors |= shared_expert_of_zeros(mixture.router.shape[1], dtype)
    return tensors


def shared_expert_of_zeros(width: int, dtype: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of Qwen2Moe's shared expert, under their names in the block, for which MixLoRA has none."""
    shapes = {
        "shared_expert.gate_proj": (ZERO_WIDTH, width),
        "shared_expert.up_proj": (ZERO_WIDTH, width),
        "shared_expert.down_proj": (width, ZERO_WIDTH),
        "shared_expert_gate": (1, width),
    }
    return {f"{name}.weight": torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


def _expert_weights(mixture: Any, name: str) -> Iterator[torch.Tensor]:
    """The weights of each expert's projection, written out: (out, in)."""
    layer = mixture.base_block.get_submodule(name)
    weight = layer.weight
    update = dict(mixture.experts.items()).get(name)
    scale = update.scale(layer) if update is not None and update.magnitude is not None else None
    for expert in range(mixture.router.shape[0]):
        if update is None:
            yield weight.clone()  # safetensors requires tensors that do not share memory
            continue
        whole = weight.float() + update.scaling * (update.lora_B[expert].float() @ update.lora_A[expert].float())
        yield (whole if scale is None else whole * scale[expert].unsqueeze(-1)).to(weight.dtype)
