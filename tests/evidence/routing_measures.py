"""Measure what a mixture's routers do: how decided they are, what their choice says about the task, what it is worth.

    entropy      of the router's softmax over the experts, divided by ln(experts): 1 where it prefers none
    load         share of a layer's slots that each expert gets: even is 1 / experts
    information  mutual information between the expert of a slot and the task, in bits, with the tasks equally frequent;
                 beside it what chance gives: the tasks' labels shuffled over the prompts
    loss         of the reference answers, and again with the choice taken away from the routers:
                   even        every expert serves every token, with equal weights
                   complement  the experts that the router wants least serve the token
    gradients    of the routers: the model's loss against the balance loss, and how much of them is the same in every
                 batch

Tokens count from where the prompts begin to differ (the chat template's system turn is the same in all) to the end of
the reference answer, which is read, not written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import entropy
from tiny import mixtures as mixtures_of
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from minilora_hub.evaluation.perplexity import GeneralText, read_text, windows_of
from minilora_hub.evaluation.tasks.items import Item
from minilora_hub.remote_code.mixture import MixtureOfLoraExperts
from minilora_hub.remote_code.routing import TopKRouting
from minilora_hub.remote_code.routing_record import RoutingRecord, record_routing
from minilora_hub.training.data import Row
from minilora_hub.training.tokens import IGNORED, Encoder, Example

ROWS = 8
SHUFFLES = 1000
NEVER = -1e4
"""Logit of an expert that a mixture does not have."""
UPPER = 97.5
"""Percentile of the shuffled information that is reported as the most that chance gives."""
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Read:
    """One forward over every row.

    Attributes:
        losses: for each row the mean of -ln p over the tokens of its answer.
        counts: how often each expert was chosen, [mixtures, rows, experts].
        entropy: of each mixture, between 0 and 1.
    """

    losses: np.ndarray
    counts: np.ndarray
    entropy: np.ndarray


def encoded(items: Sequence[Item], tokenizer: Any) -> list[Example]:
    """Return items as training encodes them."""
    encoder = Encoder(tokenizer, max_length=10**6)
    found = [
        encoder.encode(Row(item.prompt, "prompt", {"prompt": item.prompt, "completion": item.completion}))
        for item in items
    ]
    assert all(isinstance(one, Example) for one in found)
    return [one for one in found if isinstance(one, Example)]


def general_text(tokenizer: Any, count: int) -> tuple[GeneralText, list[Example]]:
    """Return the general text, and `count` windows of it, evenly spread, as rows that are answers from their start."""
    text = read_text()
    windows = windows_of(tokenizer, text)
    chosen = windows[:: max(1, len(windows) // count)][:count]
    return text, [Example(text.name, ids, ids) for ids in chosen]


def batches(examples: Sequence[Example]) -> Iterator[tuple[list[int], Batch]]:
    """Split rows into padded batches of similar length: (places of the rows, tensors)."""
    padded = DataCollatorForLanguageModeling(pad_token_id=0)
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
    for start in range(0, len(order), ROWS):
        places = order[start : start + ROWS]
        rows = [{"input_ids": examples[place].input_ids, "labels": examples[place].labels} for place in places]
        yield places, dict(padded(rows))


@torch.inference_mode()
def read(model: Any, examples: Sequence[Example]) -> Read:
    """Read every row with its reference answer. A model without mixtures has neither counts nor entropy."""
    common = min(_common([one.input_ids for one in examples]), min(len(one.input_ids) for one in examples) - 1)
    losses, tokens = np.zeros(len(examples)), 0
    counts, sums = np.zeros((0, len(examples), 0)), np.zeros(0)
    for places, batch in batches(examples):
        mask = batch["attention_mask"]
        with record_routing(mask) as record:
            logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
        labels = batch["labels"][:, 1:]
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        answered = labels != IGNORED
        losses[places] = ((each * answered).sum(1) / answered.sum(1)).double().numpy()
        if not record.logits:
            continue
        counted = mask.clone()
        counted[:, :common] = 0
        chosen, entropies = routing_of(record, counted)
        if not len(counts):
            counts, sums = np.zeros((len(chosen), len(examples), chosen.shape[-1])), np.zeros(len(chosen))
        counts[:, places], sums, tokens = chosen, sums + entropies, tokens + int(counted.sum())
    return Read(losses, counts, sums / max(tokens, 1))


def routing_of(record: RoutingRecord, counted: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return (chosen slots [mixtures, rows, experts], sum over the tokens of the entropy [mixtures]) of a forward.

    A mixture that has fewer experts than another one never chooses the rest.
    """
    numbers = [one.shape[-1] for one in record.logits]
    experts = max(numbers)
    logits = _stacked([one.double() for one in record.logits], NEVER)  # (mixtures, rows, seq, experts)
    selected = _stacked(record.selected, -1)  # (mixtures, rows, seq, K), -1 for no expert
    slots = torch.nn.functional.one_hot(selected + 1, experts + 1)[..., 1:].sum(-2)  # (mixtures, rows, seq, experts)
    chosen = (slots * counted[..., None]).sum(2)
    logarithms = logits.log_softmax(-1)
    each = -(logarithms.exp() * logarithms).sum(-1)  # (mixtures, rows, seq)
    each /= torch.tensor(numbers).double().log()[:, None, None]
    return chosen.numpy(), (each * counted).sum((1, 2)).numpy()


def _stacked(tensors: Sequence[Tensor], fill: float) -> Tensor:
    """Stack tensors of which the last dimension may differ."""
    widest = max(one.shape[-1] for one in tensors)
    return torch.stack([torch.nn.functional.pad(one, (0, widest - one.shape[-1]), value=fill) for one in tensors])


def _common(rows: Sequence[Sequence[int]]) -> int:
    columns = enumerate(zip(*rows, strict=False))
    return next((place for place, tokens in columns if len(set(tokens)) > 1), min(map(len, rows)))


# ---- what the choice says about the task ----


def information(counts: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
    """Return the mutual information of expert and task in bits, [mixtures], with the tasks equally frequent.

    Args:
        counts: [mixtures, rows, experts].
        tasks: the task of each row.
    """
    names = sorted(set(tasks))
    belongs = np.array([[task == name for name in names] for task in tasks], dtype=float)  # (rows, tasks)
    tables = np.einsum("mre,rt->mte", counts, belongs)
    if not tables.sum(-1).all():
        raise ValueError("counts: a mixture routed no token of one of the tasks")
    given = tables / tables.sum(-1, keepdims=True)  # p(expert | task)
    return entropy(given.mean(1), base=2, axis=-1) - entropy(given, base=2, axis=-1).mean(1)


def by_chance(counts: np.ndarray, tasks: Sequence[str], shuffles: int = SHUFFLES) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and `UPPER` percentile, [mixtures], of `information` with the tasks shuffled over the rows."""
    rng = np.random.default_rng(0)
    found = np.array([information(counts, list(rng.permutation(tasks))) for _ in range(shuffles)])
    return found.mean(0), np.percentile(found, UPPER, axis=0)


# ---- what the choice is worth ----


@contextlib.contextmanager
def choice_taken_away(mixtures: Sequence[MixtureOfLoraExperts], how: str) -> Iterator[None]:
    """Replace what these routers choose: ``"even"`` or ``"complement"``; see the module's docstring."""
    before = [(mixture.router.data, mixture.routing) for mixture in mixtures]
    for mixture in mixtures:
        if how == "even":
            mixture.router.data = torch.zeros_like(mixture.router)
            mixture.routing = TopKRouting(len(mixture.router))
        else:
            mixture.router.data = -mixture.router.data
    try:
        yield
    finally:
        for mixture, (router, routing) in zip(mixtures, before, strict=True):
            mixture.router.data, mixture.routing = router, routing


def without_choice(model: Any, examples: Sequence[Example], thirds: bool) -> dict[str, list[float]]:
    """Return the rows' losses with the choice taken away everywhere; with `thirds` also in a third of the layers."""
    mixtures = mixtures_of(model)
    places: dict[str, list[MixtureOfLoraExperts]] = {"even": mixtures, "complement": mixtures}
    if thirds:
        third = len(mixtures) // 3
        parts = (mixtures[:third], mixtures[third : 2 * third], mixtures[2 * third :])
        places |= {
            f"complement, {name} third": part for name, part in zip(("first", "middle", "last"), parts, strict=True)
        }
    found = {}
    for name, some in places.items():
        with choice_taken_away(some, name.partition(",")[0]):
            found[name] = rounded(read(model, examples).losses)
    return found


# ---- what moves the routers ----


def gradients(model: Any, examples: Sequence[Example], coefficient: float = 1.0) -> dict[str, Any]:
    """Compare the gradients that reach the routers, over batches of `ROWS` rows of all tasks.

    Returns:
        Per mixture, the root mean square over the batches of the norm of the gradient of the model's loss (``"loss"``)
        and of the balance loss times `coefficient` (``"balance"``); and the share of the loss's squared gradient that
        is the same in every batch, of the routers (``"agreement"``) and of the experts' B (``"agreement of B"``): 1 if
        the batches agree, about 0 if each pulls elsewhere. (An unbiased estimate: it may fall below 0.)
    """
    mixtures = mixtures_of(model)
    routers: list[Any] = [mixture.router for mixture in mixtures]
    updates: list[Any] = [next(iter(mixture.experts.values())).lora_B for mixture in mixtures]
    for parameter in (*routers, *updates):
        parameter.requires_grad_(True)
    held: dict[str, list[list[Tensor]]] = {"loss": [], "balance": [], "B": []}
    stride = math.ceil(len(examples) / ROWS)
    for start in range(stride):  # every batch has rows of all tasks
        ((_, batch),) = batches(examples[start::stride])
        with record_routing(batch["attention_mask"]) as record:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
        )
        balance = mixtures[0].routing.losses(record.logits, batch["attention_mask"])["aux_loss"]
        held["balance"].append([g * coefficient for g in torch.autograd.grad(balance, routers, retain_graph=True)])
        both = torch.autograd.grad(loss, [*routers, *updates])
        held["loss"].append(list(both[: len(routers)]))
        held["B"].append(list(both[len(routers) :]))

    def size(name: str) -> list[float]:
        layers = zip(*held[name], strict=True)
        return [math.sqrt(np.mean([float(each.double().square().sum()) for each in layer])) for layer in layers]

    return {
        "loss": significant(size("loss")),
        "balance": significant(size("balance")),
        "agreement": agreement(held["loss"]),
        "agreement of B": agreement(held["B"]),
    }


def agreement(found: Sequence[Sequence[Tensor]]) -> float:
    """Return (|mean g|^2 less what noise alone gives it) / (mean of |g|^2), of gradients [batches][tensors]."""
    rows = torch.stack([torch.cat([tensor.double().flatten() for tensor in batch]) for batch in found])
    count, squares = len(rows), float(rows.square().sum(1).mean())
    if squares == 0:
        return 0.0
    same = float(rows.mean(0).square().sum())
    return round((count * same - squares) / (count - 1) / squares, 4)


def rounded(values: Sequence[float] | np.ndarray, digits: int = 5) -> list[float]:
    """Round values for a result file."""
    return [round(float(value), digits) for value in values]


def significant(values: Sequence[float]) -> list[float]:
    """Round values to four significant digits."""
    return [float(f"{value:.4g}") for value in values]
