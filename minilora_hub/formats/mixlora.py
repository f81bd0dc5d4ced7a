"""Read the reference format of MixLoRA, which the packages `mixlora` and MoE-PEFT read and write.

    adapter_config.json   peft_type MIXLORA, r, lora_alpha, …, num_experts, routing_strategy, and its own fields
    adapter_model.bin     a pickle of named tensors, one for every expert, named as `adapter_folder.names` says

Unexpected properties of this format, found by running `mixlora` 0.2.3:

- The magnitudes of a MixDoRA (`use_dora`) are not in the file. The package computes m = ||W + s B A|| when it loads,
  so that c = m / ||W + s B A|| is one: it computes plain LoRA, and plain LoRA is imported. In training, its magnitudes
  stayed at ||W||; `dora="trained"` computes those from the base's weights.
- `expert_lora` (a rank and alpha for the experts) is read and then ignored by `mixlora`; MoE-PEFT, which trains,
  uses it, and so does the import.
- It applies dropout at inference, and rejects a dropout of 0: an adapter without dropout is written with 1e-12.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers.activations import ACT2FN

from minilora_hub.adapter_folder.folders import AdapterFolder
from minilora_hub.adapter_folder.names import PEFT_CONFIG, from_reference, reference_projection
from minilora_hub.adapter_folder.reading import check_against_base, read_tensors
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError
from minilora_hub.formats.settings import Settings, read_reference_fields
from minilora_hub.remote_code.attach import updates_at
from minilora_hub.remote_code.base_structure import plan_sites
from minilora_hub.remote_code.configuration_minilora import MixLoraConfig
from minilora_hub.remote_code.layer_stacks import find_decoder_layers, linears_in
from minilora_hub.remote_code.linear_layers import row_norms_squared

ReferenceDora = Literal["loaded", "trained"]


def read_reference(
    source: AdapterFolder, base: BaseSource, dora: ReferenceDora = "loaded"
) -> tuple[Any, dict[str, torch.Tensor], list[str]]:
    """Read an adapter in the reference format.

    Args:
        source: its folder.
        base: its base.
        dora: how to read an adapter with `use_dora`, whose magnitudes the format lacks; see the module's docstring.

    Returns:
        A MixLoraConfig, ``{canonical name: tensor}``, and notes for the user, one line each.

    Raises:
        AdapterError: a field or a tensor is missing, has the wrong type, or is not supported.
    """
    settings = Settings(source.config)
    notes: list[str] = []
    fields = read_reference_fields(source)
    fields["target_modules"] = _targets(settings, base, notes)
    _check_activation(settings, base)
    use_dora = fields.pop("use_dora")
    if dora != "loaded" and not use_dora:
        raise AdapterError(f"reference_dora={dora!r}: only applies to an adapter with use_dora, which this is not")
    tensors = _stack(read_tensors(source.folder), fields["num_experts"])
    if fields.get("router_sparse_step", 1) > 1 and "layers.0.mlp.router" in tensors:
        fields["router_sparse_step"] = 1  # MoE-PEFT reads the setting but ignores it: every layer is a mixture
        notes.append("sparse_step: every layer has a router in the file, so every layer is a mixture")
    try:
        config = MixLoraConfig(**fields)
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{PEFT_CONFIG}: {error}") from error
    if use_dora and dora == "trained":
        config.use_dora = True
        tensors |= _magnitudes(config, base)
        notes.append(
            "magnitudes are not in the file: the row norms of the base are used, which training does not change"
        )
    elif use_dora:
        notes.append(
            "use_dora: the file has no magnitudes, and the mixlora package then computes plain LoRA; so does this "
            "import (--reference-dora trained takes the base's row norms instead)"
        )
    check_against_base(config, tensors, base, "the adapter")
    return config, tensors, notes


def _targets(settings: Settings, base: BaseSource, notes: list[str]) -> list[str]:
    """Return the targets that the base has; the reference lists those of every family and skips missing ones."""
    content = settings.require("target_modules", (list, dict))
    named = [name for name, on in content.items() if on is True] if isinstance(content, dict) else content
    if not named or not all(isinstance(name, str) for name in named):
        raise settings.error("target_modules", "must name at least one projection")
    wanted = {reference_projection(name) for name in named}
    leaves = {path.rpartition(".")[2] for path in linears_in(find_decoder_layers(base.skeleton)[1][0])}
    if wanted - leaves:
        notes.append(f"target_modules {sorted(wanted - leaves)}: not in the base, skipped as in the reference")
    if not wanted & leaves:
        raise settings.error("target_modules", f"the base {base.name!r} has none of them; it has {sorted(leaves)}")
    return sorted(wanted & leaves)


def _check_activation(settings: Settings, base: BaseSource) -> None:
    """The reference may use another activation than the base's own; here it is always the base's."""
    named, own = settings.get("act_fn", str), activation_of(base)
    if named is None or named == own:
        return
    x = torch.linspace(-8, 8, 257)
    if named not in ACT2FN or own is None or not torch.allclose(ACT2FN[named](x), ACT2FN[own](x), rtol=0, atol=1e-6):
        raise settings.error("act_fn", f"the base computes {own!r}; another activation of the experts is not supported")


def activation_of(base: BaseSource) -> str | None:
    """Return the name of the base's activation, as its configuration has it."""
    text = base.config.get_text_config(decoder=True)
    name = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None)
    return name if isinstance(name, str) else None


def expert_rank_and_alpha(config: Any) -> tuple[int, float]:
    """Return the rank and the alpha of the experts of a MixLoraConfig."""
    alpha = config.expert_alpha
    if alpha is None:
        alpha = config.lora_alpha if config.expert_r is None else 2 * config.expert_r
    return config.expert_r or config.r, alpha


def _stack(found: dict[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
    """Stack the experts' tensors under canonical names."""
    tensors: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in found.items():
        try:
            canonical, expert = from_reference(name)
        except ValueError as error:
            raise AdapterError(str(error)) from error
        place: dict[Any, torch.Tensor] = tensors if expert is None else stacks.setdefault(canonical, {})
        key = canonical if expert is None else expert
        if key in place:
            raise AdapterError(f"{name}: this tensor is in the file twice, under its current and its legacy name")
        place[key] = tensor
    for canonical, experts in stacks.items():
        if len(experts) != num_experts or max(experts) >= num_experts:
            have = f"experts {sorted(experts)[:8]}"
            raise AdapterError(
                f"{canonical}: {have} are in the file, num_experts={num_experts} requires that many, numbered from 0"
            )
        first = experts[0]
        for expert, tensor in experts.items():
            if tensor.shape != first.shape or tensor.dtype != first.dtype:
                raise AdapterError(
                    f"{canonical}: expert {expert} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                    f"expert 0 is {first.dtype} of shape {tuple(first.shape)}"
                )
        tensors[canonical] = torch.stack([experts[expert] for expert in range(num_experts)])
    return tensors


def _magnitudes(config: Any, base: BaseSource) -> dict[str, torch.Tensor]:
    """The row norms of the base's own weights, for every update."""
    model = base.load(torch.float32)
    magnitudes = {}
    for site in plan_sites(model, config):
        for name, projection, _, _, _, shape_b in updates_at(site, config):
            module = model.get_submodule(f"{site.path}.{projection}" if projection else site.path)
            magnitudes[f"{name}.magnitude"] = row_norms_squared(module).sqrt().expand(shape_b[:-1]).clone()
    return magnitudes
