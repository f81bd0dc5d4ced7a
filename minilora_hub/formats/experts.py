"""Add experts to a trained MixLoRA or drop some, and measure how much that changes its output.

Added experts are clones with the same tensors and the same router row, or a row with a little seeded noise, so that
training can differentiate them. Even an exact clone changes the output: a token routed to an expert is also routed to
its clone, which replaces another of its top-k experts. Dropped experts are, separately in each layer, those that served
the fewest tokens of the prompts. The change of the output is measured on the same prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from minilora_hub.adapter_folder.companions import own_tokenizer
from minilora_hub.adapter_folder.folders import AdapterFolder, only_ours, read_folder
from minilora_hub.adapter_folder.reading import our_config, read_ours
from minilora_hub.adapter_folder.writing import write_ours
from minilora_hub.bases.skeleton import BaseSource, find_base
from minilora_hub.errors import AdapterError
from minilora_hub.remote_code.modeling_minilora import MixLoraForCausalLM
from minilora_hub.seeds import require_seed
from minilora_hub.whole_folders import require_free, whole_folder

Load = dict[str, list[float]]
"""Canonical name of a mixture -> share of the routed slots of each expert."""

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
    """Result of adding or dropping experts, with its effect measured on prompts.

    Attributes:
        folder: the new adapter.
        experts: experts per layer before and after.
        kept: per layer, the index of the former expert for each new expert.
        load: per layer and former expert, its share of the routed slots.
        tokens: number of tokens in the prompts.
        kl: mean Kullback-Leibler divergence of the next-token distributions, before against after, in nats.
        max_logit_difference: the largest difference of a logit.
        top_token_agreement: the share of positions whose most probable next token did not change.
        notes: notes for the user, one line each.
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
        out: an empty folder, or one that does not exist. It is written completely or not at all.
        clone: indices of the experts to clone; an index may be repeated.
        base: where to load the base from. Default: what the adapter names.
        prompts: prompts on which the change is measured. Default: `PROMPTS`.
        noise: standard deviation of the noise added to a clone's router row.
        seed: seed of the noise.

    Raises:
        AdapterError: the adapter is not a MixLoRA, or has no such expert.
        ValueError: the seed is out of range.
    """
    found, config = _mixlora(source, out)
    count = config.num_experts
    wrong = [expert for expert in clone if not 0 <= expert < count]
    if wrong or not clone:
        raise AdapterError(f"clone={list(clone)}: must name experts from 0 to {count - 1}")
    if not 0 <= noise < float("inf"):
        raise AdapterError(f"noise={noise}: must be a number of at least 0")
    require_seed(seed)

    def choose(load: Load) -> dict[str, list[int]]:
        return {name: [*range(count), *clone] for name in load}

    def add_noise(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name in sorted(name for name in tensors if name.endswith(".router")):
            router = tensors[name]
            router[count:] += (torch.randn(len(clone), router.shape[1], generator=generator) * noise).to(router.dtype)

    return _change(found, config, Path(out), base, prompts, choose, add_noise if noise else None)


def drop_experts(
    source: str | Path,
    out: str | Path,
    count: int,
    *,
    base: str | None = None,
    prompts: Sequence[str] | None = None,
) -> Change:
    """Drop the experts that serve the fewest tokens of the prompts, separately in each layer.

    Args:
        source: the adapter's folder, in our format.
        out: an empty folder, or one that does not exist. It is written completely or not at all.
        count: number of experts to drop per layer.
        base: where to load the base from. Default: what the adapter names.
        prompts: prompts on which load and change are measured, ideally typical of the adapter's task. Default:
            `PROMPTS`.

    Raises:
        AdapterError: the adapter is not a MixLoRA, or would have too few experts left.
    """
    found, config = _mixlora(source, out)
    least = config.num_experts_per_tok or 1
    if not 1 <= count <= config.num_experts - least:
        raise AdapterError(
            f"count={count}: must be from 1 to {config.num_experts - least}, since there are {config.num_experts} "
            f"experts and every token needs {least}"
        )

    def choose(load: Load) -> dict[str, list[int]]:
        kept = {}
        for name, shares in load.items():
            by_load = sorted(range(len(shares)), key=lambda expert: (-shares[expert], expert))
            kept[name] = sorted(by_load[: config.num_experts - count])
        return kept

    return _change(found, config, Path(out), base, prompts, choose)


def _mixlora(source: str | Path, out: str | Path) -> tuple[AdapterFolder, Any]:
    require_free(out)
    found = read_folder(source)
    if found.dialect != "minilora" or found.method != "mixlora":
        raise AdapterError(f"adapter {found.name!r} is no MixLoRA in our format: only that has experts")
    if field := only_ours(found.config):
        raise AdapterError(f"adapter {found.name!r}: {field}: only a mixture with equal blocks is changed")
    return found, our_config(found)


def _change(
    found: AdapterFolder,
    config: Any,
    out: Path,
    base: str | None,
    prompts: Sequence[str] | None,
    choose: Callable[[Load], dict[str, list[int]]],
    finish: Callable[[dict[str, torch.Tensor]], None] | None = None,
) -> Change:
    """Write the adapter with other experts, and measure both on the same prompts and the same loaded base.

    Args:
        found: the adapter.
        config: its configuration.
        out: where to.
        base: the base that the user names.
        prompts: for the measurement.
        choose: returns the experts of each mixture of the new adapter, by their numbers in the old one.
        finish: changes the new tensors in place.
    """
    located = find_base(*found.named_base(base))
    _, tensors, _ = read_ours(found, located)
    ids = _token_ids(found.folder, located, prompts)
    model = MixLoraForCausalLM.from_pretrained(str(found.folder), base_model=located.load(torch.float32))
    before, load = _outputs(model, ids, config.num_experts)
    kept = choose(load)
    chosen = {name: _chosen(name, tensor, kept) for name, tensor in tensors.items()}
    if finish is not None:
        finish(chosen)
    new = copy.deepcopy(config)
    new.num_experts = len(next(iter(kept.values())))
    with whole_folder(out) as folder:
        notes = write_ours(folder, new, chosen, located, found.folder)
        changed = MixLoraForCausalLM.from_pretrained(folder, base_model=model.unload())
        after, _ = _outputs(changed, ids, new.num_experts)
    kl, largest, agreement = _compare(before, after)
    return Change(
        folder=out,
        experts=(config.num_experts, new.num_experts),
        kept=tuple(tuple(experts) for experts in kept.values()),
        load=tuple(tuple(round(share, 4) for share in shares) for shares in load.values()),
        tokens=sum(part.shape[0] for part in before),
        kl=kl,
        max_logit_difference=largest,
        top_token_agreement=agreement,
        notes=tuple(notes),
    )


def _chosen(name: str, tensor: torch.Tensor, kept: dict[str, list[int]]) -> torch.Tensor:
    """Return the tensor with the chosen experts in place of all, where it is a router or a stack of experts."""
    block = name.removesuffix(".router") if name.endswith(".router") else name.partition(".experts.")[0]
    return tensor[kept[block]].clone() if block in kept else tensor


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


def _outputs(model: Any, ids: list[list[int]], experts: int) -> tuple[list[torch.Tensor], Load]:
    """Return the logits of each prompt, (tokens, vocabulary), and each expert's share of the routed slots."""
    names = [site.name for site in model.sites if hasattr(site, "structure")]  # in the order of execution
    logits, counts = [], torch.zeros(len(names), experts)
    with torch.no_grad():
        for row in ids:
            outputs = model(torch.tensor([row]), output_routing=True)
            logits.append(outputs.logits[0].float())
            for number, chosen in enumerate(outputs.selected_experts):
                counts[number] += torch.bincount(chosen[chosen >= 0].flatten(), minlength=experts)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    return logits, dict(zip(names, shares.tolist(), strict=True))


def _compare(before: list[torch.Tensor], after: list[torch.Tensor]) -> tuple[float, float, float]:
    """Return the mean KL divergence in nats, the largest logit difference, and the share of equal top tokens."""
    old, new = torch.cat(before), torch.cat(after)  # (tokens, vocabulary)
    log_old, log_new = functional.log_softmax(old, dim=-1), functional.log_softmax(new, dim=-1)
    divergence = functional.kl_div(log_new, log_old, log_target=True, reduction="none").sum(dim=-1)
    divergence = divergence.clamp(min=0)  # rounding makes it negative where both are nearly equal
    same = (old.argmax(dim=-1) == new.argmax(dim=-1)).float().mean()
    return divergence.mean().item(), (old - new).abs().max().item(), same.item()
