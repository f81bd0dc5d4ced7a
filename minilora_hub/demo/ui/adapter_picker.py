"""The adapter picker: a card for each adapter that can be chosen, and a field for any public one on the Hub."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import gradio as gr
from huggingface_hub import constants

from minilora_hub.demo.adapters.cards import AdapterCard
from minilora_hub.demo.adapters.catalogue import CHOSEN
from minilora_hub.demo.adapters.columns import headline
from minilora_hub.demo.runs.kept_runs import KeptRuns
from minilora_hub.demo.ui.blind_bar import BLIND_OFF
from minilora_hub.demo.ui.components import QUIET, component
from minilora_hub.demo.ui.layout import Parts
from minilora_hub.demo.ui.page_state import idle_stage, status
from minilora_hub.errors import MiniLoraError


def build_picker(runs: KeptRuns) -> gr.HTML:
    """Build it, closed."""
    with gr.Accordion("Adapters", open=False, elem_id="ml-picker-box"):
        return component("picker", value=view(runs, ""), elem_id="ml-picker")


def view(runs: KeptRuns, visitor: str, *, phase: str = "idle", words: str = "") -> dict:
    """Return what the picker shows to a visitor."""
    chosen = runs.chosen(visitor)
    names = dict.fromkeys([*runs.catalogue.names, *chosen])
    return {
        "base": runs.catalogue.base,
        "cards": [*_cards(runs, names)],
        "chosen": chosen,
        "limit": CHOSEN,
        "fetches": runs.fetches,
        "phase": phase,
        "words": words,
    }


def _cards(runs: KeptRuns, names: Iterable[str]) -> Iterable[dict]:
    for name in names:
        try:
            yield _card(runs.catalogue.card(name))
        except MiniLoraError as error:
            yield {"name": name, "kind": "", "facts": [f"{error}"], "loss": [], "scores": [], "link": None}


def _card(card: AdapterCard) -> dict[str, Any]:
    facts = [
        card.detail,
        f"{card.parameters:,} parameters",
        f"{card.bytes / 1e6:,.1f} MB" if card.bytes >= 1e5 else f"{card.bytes / 1e3:,.1f} kB",
        f"licence {card.license}" if card.license else "licence unknown",
    ]
    scores = [
        {"task": one.task, "metric": one.metric, "value": one.value, "base": one.base_value, "n": one.n}
        for one in card.scores
    ]
    return {
        "name": card.name,
        "kind": card.kind,
        "facts": facts,
        "loss": list(card.loss),
        "scores": scores,
        # Only ever an address on the Hub: a link that an adapter's author wrote could lead anywhere.
        "link": f"{constants.ENDPOINT}/{card.repo}" if card.repo else None,
        "trouble": card.trouble,
    }


def wire_picker(runs: KeptRuns, parts: Parts, picker: gr.HTML) -> None:
    """Connect it: the chosen adapters take the place of those on the page."""
    unchanged = [gr.skip()] * 5

    async def choose(event: gr.EventData, request: gr.Request) -> AsyncIterator[list]:
        visitor, told = request.session_hash or "", event._data or {}
        names = [str(name) for name in told.get("names") or ()][: CHOSEN + 1]
        yield [view(runs, visitor, phase="busy", words="Loading what is not here yet…"), *unchanged]
        try:
            await runs.choose(visitor, names)
        except MiniLoraError as error:
            yield [view(runs, visitor, phase="error", words=f"Not changed: {error}."), *unchanged]
            return
        runs.make_blind(visitor, False)
        words = f"Compared from now on: {', '.join(names)}."
        stage = idle_stage(runs.about(visitor))
        head = headline(runs.engine, columns=runs.columns_of(visitor))
        nothing = {"phase": "none", "words": ""}
        yield [
            view(runs, visitor, phase="done", words=words),
            head,
            stage,
            nothing,
            BLIND_OFF,
            status("idle", "Ready."),
        ]

    def follow(shown: dict | None, request: gr.Request) -> Any:
        now = view(runs, request.session_hash or "")
        # The choice made here changes the notice, too: what it says of itself stays.
        return gr.skip() if shown and shown["chosen"] == now["chosen"] else now

    outputs = [picker, parts.head, parts.stage, parts.notice, parts.blind, parts.status]
    picker.submit(choose, None, outputs, concurrency_id="link", **QUIET)
    # A link in the page's address may have changed what is chosen.
    parts.notice.change(follow, picker, picker, queue=False, **QUIET)
