"""Experts added to a trained MixLoRA, or taken out of it, with a measure of what that changes.

Added experts are clones: the same tensors and the same router row, or one with a little seeded noise so that training
can tell them apart. Even an exact clone changes the output, since a token that chose an expert now chooses its clone,
too, and so one of its other experts less. What is dropped is, in every layer apart, what served the fewest tokens of
the prompts. Both ways the change of the output is measured on those prompts, and told.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.companions import own_tokenizer
from minilora_hub.adapter_folder.folders import AdapterFolder, read_folder
from minilora_hub.adapter_folder.reading import our_config, read_ours
from minilora_hub.adapter_folder.writing import require_free, whole_folder, write_ours
from minilora_hub.bases.skeleton import BaseSource, find_base
from minilora_hub.errors import AdapterError

if TYPE_CHECKING:
    import torch

PROMPTS = (
    "The capital of France is",
    "Write this date as YYYY-MM-DD: the 3rd of May 1999",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a small mill at the edge of a wood, and in it lived",
    "Translate into German: Good morning, where is the railway station?",
    '{"name": "Maria", "age": 31, "city":',
)


@dataclass(frozen=True)
class Change:
    """What a change of the experts did, measured on prompts.

    Attributes:
        folder: the new adapter.
        experts: experts per layer before and after.
        kept: per layer, which of the former experts the new ones are.
        load: per layer and former expert, the share of the choices of experts that fell on it.
        tokens: tokens of the prompts.
        kl: mean Kullback-Leibler divergence of the next-token distributions, before against after, in nats.
        max_logit_difference: the largest difference of a logit.
        top_token_agreement: the share of tokens whose most probable next token stayed the same.
        notes: what the user should know, a line each.
    """

    folder: Path
    experts: tuple[int, int]
    kept: tuple[tuple[int, ...], ...]
    load: tuple[tuple[float, ...], ...]
    tokens: int
    kl: float
    max_logit_difference: float
    top_token_agreement: float
    notes: tuple[str, ...] = ()


def add_experts(
    source: str | Path,
    out: str | Path,
    clone: Sequence[int],
    *,
    base: str | None = None,
    prompts: Sequence[str] | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> Change:
    """Add clones of experts to a MixLoRA.

    Args:
        source: the adapter's folder, in our format.
        out: a folder that is empty, or not there yet. It appears whole or not at all.
        clone: numbers of the experts to clone; one may be named several times.
        base: load the base from there. Default: what the adapter names.
        prompts: on which the change is measured. Default: `PROMPTS`.
        noise: standard deviation of what is added to a clone's router row.
        seed: of the noise.

    Raises:
        AdapterError: the adapter is no MixLoRA, or has no such expert.
    """
    import torch

    found, config = _mixlora(source, out)
    count = config.num_experts
    wrong = [expert for expert in clone if not 0 <= expert < count]
    if wrong or not clone:
        raise AdapterError(f"clone={list(clone)}: must name experts from 0 to {count - 1}")
    if not 0 <= noise < float("inf"):
        raise AdapterError(f"noise={noise}: must be a number of at least 0")
    located = find_base(*found.named_base(base))
    _, tensors, _ = read_ours(found, located)
    routers = sorted(name for name in tensors if name.endswith(".router"))
    kept = {name.removesuffix(".router"): (*range(count), *clone) for name in routers}
    changed = _choose(tensors, kept)
    if noise:
        generator = torch.Generator().manual_seed(seed)
        for name in routers:
            row = torch.randn(len(clone), changed[name].shape[1], generator=generator) * noise
            changed[name][count:] += row.to(changed[name].dtype)
    new = _with_experts(config, count + len(clone))
    return _write(found, config, new, changed, kept, located, Path(out), prompts)


def drop_experts(
    source: str | Path,
    out: str | Path,
    count: int,
    *,
    base: str | None = None,
    prompts: Sequence[str] | None = None,
) -> Change:
    """Drop the experts that serve the fewest tokens of the prompts, in every layer apart.

    Args:
        source: the adapter's folder, in our format.
        out: a folder that is empty, or not there yet. It appears whole or not at all.
        count: how many experts each layer loses.
        base: load the base from there. Default: what the adapter names.
        prompts: on which load and change are measured; take some of what the adapter is for. Default: `PROMPTS`.

    Raises:
        AdapterError: the adapter is no MixLoRA, or would have too few experts left.
    """
    found, config = _mixlora(source, out)
    least = config.num_experts_per_tok or 1
    if not 1 <= count <= config.num_experts - least:
        raise AdapterError(
            f"count={count}: must be from 1 to {config.num_experts - least}, since {config.num_experts} experts are "
            f"there and every token takes {least}"
        )
    located = find_base(*found.named_base(base))
    _, tensors, _ = read_ours(found, located)
    model = _model(found, located)
    ids = _token_ids(found.folder, located, prompts)
    _, load = _outputs(model, ids, config.num_experts)
    blocks = _mixture_names(model)
    kept = {}
    for name, shares in zip(blocks, load, strict=True):
        by_load = sorted(range(len(shares)), key=lambda expert: (-shares[expert], expert))
        kept[name] = tuple(sorted(by_load[: config.num_experts - count]))
    new = _with_experts(config, config.num_experts - count)
    return _write(found, config, new, _choose(tensors, kept), kept, located, Path(out), prompts, model)


def _mixlora(source: str | Path, out: str | Path) -> tuple[AdapterFolder, Any]:
    require_free(out)
    found = read_folder(source)
    if found.dialect != "minilora" or found.method != "mixlora":
        raise AdapterError(f"adapter {found.folder.name!r} is no MixLoRA in our format: only that has experts")
    return found, our_config(found)


def _with_experts(config: Any, count: int) -> Any:
    changed = copy.deepcopy(config)
    changed.num_experts = count
    return changed


def _choose(tensors: dict[str, torch.Tensor], kept: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors with these experts in the stacks and routers of each block, in this order."""
    chosen = {}
    for name, tensor in tensors.items():
        block = name.removesuffix(".router") if name.endswith(".router") else name.partition(".experts.")[0]
        inside = block in kept and (name.endswith(".router") or ".experts." in name)
        chosen[name] = tensor[list(kept[block])].clone() if inside else tensor
    return chosen


def _write(
    found: AdapterFolder,
    config: Any,
    new: Any,
    tensors: dict[str, torch.Tensor],
    kept: dict[str, tuple[int, ...]],
    base: BaseSource,
    out: Path,
    prompts: Sequence[str] | None,
    model: Any = None,
) -> Change:
    """Write the new adapter, and measure old and new on the same prompts and one base."""
    from minilora_hub import MixLoraForCausalLM

    ids = _token_ids(found.folder, base, prompts)
    with whole_folder(out) as folder:
        notes = write_ours(folder, new, tensors, base, found.folder)
        model = model or _model(found, base)
        blocks = _mixture_names(model)
        before, load = _outputs(model, ids, config.num_experts)
        plain = model.unload()
        after, _ = _outputs(MixLoraForCausalLM.from_pretrained(folder, base_model=plain), ids, new.num_experts)
        kl, largest, agreement = _compare(before, after)
    return Change(
        folder=out,
        experts=(config.num_experts, new.num_experts),
        kept=tuple(kept[name] for name in blocks),
        load=tuple(tuple(round(share, 4) for share in shares) for shares in load),
        tokens=sum(part.shape[0] for part in before),
        kl=kl,
        max_logit_difference=largest,
        top_token_agreement=agreement,
        notes=tuple(notes),
    )


def _model(found: AdapterFolder, base: BaseSource) -> Any:
    import torch

    from minilora_hub import MixLoraForCausalLM

    return MixLoraForCausalLM.from_pretrained(str(found.folder), base_model=base.load(torch.float32))


def _mixture_names(model: Any) -> list[str]:
    """Canonical names of the mixtures, in the order in which they run."""
    return [site.name for site in model.sites if hasattr(site, "structure")]


def _token_ids(folder: Path, base: BaseSource, prompts: Sequence[str] | None) -> list[list[int]]:
    """The prompts as token ids; without a tokenizer, fixed ids spread over the vocabulary."""
    tokenizer = own_tokenizer(folder) or base.tokenizer
    if tokenizer is None:
        if prompts is not None:
            raise AdapterError("prompts: neither the adapter nor its base has a tokenizer to read them")
        size = base.config.get_text_config(decoder=True).vocab_size
        return [[(7 + 31 * start + 97 * i) % size for i in range(12)] for start in range(len(PROMPTS))]
    ids = [list(tokenizer(text)["input_ids"]) for text in (prompts or PROMPTS)]
    return [row for row in ids if row]


def _outputs(model: Any, ids: list[list[int]], experts: int) -> tuple[list[torch.Tensor], list[list[float]]]:
    """Logits of every token, (tokens, vocabulary) a prompt, and per mixture the share of choices of each expert."""
    import torch

    logits = []
    counts: Any = None
    with torch.no_grad():
        for row in ids:
            outputs = model(torch.tensor([row]), output_routing=True)
            logits.append(outputs.logits[0].float())
            here = torch.stack(
                [
                    torch.bincount(chosen[chosen >= 0].flatten(), minlength=experts)
                    for chosen in outputs.selected_experts
                ]
            ).float()  # (mixtures, experts)
            counts = here if counts is None else counts + here
    return logits, (counts / counts.sum(dim=1, keepdim=True).clamp_min(1)).tolist()


def _compare(before: list[torch.Tensor], after: list[torch.Tensor]) -> tuple[float, float, float]:
    """Mean divergence in nats, the largest difference of a logit, the share of equal most probable tokens."""
    import torch
    from torch.nn import functional

    old, new = torch.cat(before), torch.cat(after)  # (tokens, vocabulary)
    log_old, log_new = functional.log_softmax(old, dim=-1), functional.log_softmax(new, dim=-1)
    divergence = functional.kl_div(log_new, log_old, log_target=True, reduction="none").sum(dim=-1)
    same = (old.argmax(dim=-1) == new.argmax(dim=-1)).float().mean()
    return divergence.mean().item(), (old - new).abs().max().item(), same.item()
