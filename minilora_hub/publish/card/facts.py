"""Describe an adapter in the rows and sentences of its card: its method, its settings, its training."""

from __future__ import annotations

import re
from typing import Any

from minilora_hub.adapter_folder.results import METHODS, Base, Results, Training
from minilora_hub.formatting import code, duration, inline, number, percent

PAPERS = {"mixlora": "2404.15159", "dora": "2402.09353", "lora": "2106.09685"}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PUBLIC_HUB = "https://huggingface.co"
Rows = list[tuple[str, str]]


def base_link(base: Base, hub: str) -> str:
    """Return the base's id, as a link to its page where it is an id on the Hub."""
    if not HUB_ID.fullmatch(base.id):
        return code(base.id)
    tree = f"/tree/{base.revision}" if base.revision and HUB_ID.fullmatch(base.revision) else ""
    return f"[{inline(base.id)}]({hub}/{base.id}{tree})"


def summary(results: Results, config: dict[str, Any], hub: str) -> str:
    """Return the first sentence of the card."""
    method = results.method
    kind = {
        "mixlora": f"a mixture of {inline(config.get('num_experts'))} LoRA experts in {_mixtures(config)}, "
        f"{_active_experts(config)}",
        "dora": "weight-decomposed low-rank adaptation",
        "lora": "low-rank adaptation",
    }[method]
    return (
        f"A [{METHODS[method]}](https://arxiv.org/abs/{PAPERS[method]}) adapter ({kind}) for "
        f"{base_link(results.base, hub)}: {_size(results)}."
    )


def _mixtures(config: dict[str, Any]) -> str:
    step = config.get("router_sparse_step") or 1
    return "each feed-forward block" if step == 1 else f"one feed-forward block in {inline(step)}"


def _active_experts(config: dict[str, Any]) -> str:
    """Return how many experts are active for a token, according to the routing strategy."""
    if config.get("routing_strategy") == "top_p":
        return (
            f"each token served by its most probable ones until their probabilities exceed "
            f"{inline(config.get('router_top_p'))}"
        )
    return f"{inline(config.get('num_experts_per_tok'))} of them active for each token"


def _routing_rows(config: dict[str, Any]) -> Rows:
    """Return the routing strategy and the settings that only it has."""
    rows = [("Routing", inline(config.get("routing_strategy")))]
    if config.get("routing_strategy") == "top_p":
        rows += [
            ("Probability that a token's experts exceed", inline(config.get("router_top_p"))),
            ("Router temperature", inline(config.get("router_temperature") or "none")),
        ]
    if config.get("routing_strategy") == "switch":
        rows += [
            ("Expert capacity in training", f"{inline(config.get('expert_capacity'))} tokens of a sequence"),
            ("z-loss coefficient", inline(config.get("router_z_loss_coef"))),
            ("Layers with a mixture", f"1 in {inline(config.get('router_sparse_step') or 1)}"),
        ]
    return rows


def _size(results: Results) -> str:
    if results.parameters is None:
        return "its number of parameters is unknown"
    share = "" if results.share is None else f", {percent(results.share)} of the base's"
    return f"{number(results.parameters)} parameters{share}"


def adapter_rows(results: Results, config: dict[str, Any], hub: str) -> Rows:
    """Return the rows about method, settings and base."""
    base = results.base
    rows = [
        ("Method", METHODS[results.method] + (" with DoRA experts" if _mixdora(results, config) else "")),
        ("Rank, alpha", f"{inline(config.get('r'))}, {inline(config.get('lora_alpha'))}"),
    ]
    if results.method == "mixlora":
        rank = config.get("expert_r") or config.get("r")
        alpha = config.get("expert_alpha")
        if alpha is None:  # the configuration's own rule
            alpha = config.get("lora_alpha") if config.get("expert_r") is None else 2 * config["expert_r"]
        experts = inline(config.get("num_experts"))
        top_p = config.get("routing_strategy") == "top_p"
        active = f"1 to {experts}" if top_p else inline(config.get("num_experts_per_tok"))
        rows += [
            ("Experts", f"{experts}, {active} per token"),
            ("Rank, alpha of an expert", f"{inline(rank)}, {inline(alpha)}"),
            *_routing_rows(config),
            ("Load-balance coefficient", inline(config.get("router_aux_loss_coef"))),
        ]
    targets = config.get("target_modules")
    shown = ", ".join(map(str, targets)) if isinstance(targets, list) else targets
    rows += [
        ("Modules", code(shown)),
        ("Dropout", number(config.get("lora_dropout"))),
        ("Scaling", "alpha / √rank" if config.get("use_rslora") else "alpha / rank"),
        ("Parameters", f"{number(results.parameters)} ({percent(results.share)} of the base's)"),
        ("Base", base_link(base, hub)),
        ("Base parameters", number(base.parameters)),
        ("Base revision", code(base.revision)),
        ("Base fingerprint", code(base.fingerprint)),
    ]
    return rows


def _mixdora(results: Results, config: dict[str, Any]) -> bool:
    return results.method == "mixlora" and bool(config.get("use_dora"))


def training_rows(training: Training) -> Rows:
    """Return the rows about the training."""
    libraries = ", ".join(f"{name} {value}" for name, value in training.libraries.items()) or None
    return [
        ("Steps", number(training.steps)),
        ("Wall time", duration(training.seconds)),
        ("Hardware", inline(training.hardware)),
        ("Libraries", inline(libraries)),
        *((inline(name).capitalize(), inline(value)) for name, value in training.hyperparameters.items()),
    ]
