"""The adapter picker: a card for each adapter, a field for one on the Hub, and ``?adapter=`` links."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr
from huggingface_hub import constants

from minilora_hub.demo.adapters.cards import AdapterCard
from minilora_hub.demo.adapters.catalogue import MOST_ADAPTERS
from minilora_hub.demo.adapters.columns import headline
from minilora_hub.demo.runs.runner import Runner
from minilora_hub.demo.runs.visitor import Visitor, Visitors
from minilora_hub.demo.ui.blind_bar import BLIND_OFF
from minilora_hub.demo.ui.components import QUIET, component, sent
from minilora_hub.demo.ui.layout import NO_NOTICE, Parts
from minilora_hub.demo.ui.page_state import idle_stage, status
from minilora_hub.errors import MiniLoraError
from minilora_hub.publish.listing import ListedAdapter, list_adapters

FOUND = 20
"""The most results of a search that are shown."""


def picker_value(
    runner: Runner, chosen: Sequence[str], phase: str = "idle", words: str = "", found: Sequence[ListedAdapter] = ()
) -> dict:
    """Return the value of the picker: all cards, the names of the chosen adapters, a message, and search results."""
    catalogue = runner.catalogue
    cards = []
    for name in dict.fromkeys([*catalogue.names, *chosen]):
        try:
            card = catalogue.card(name)
        except MiniLoraError as error:
            card = AdapterCard(name, "", [f"{error}"])
        # Only URLs of the Hub: links that an adapter's author wrote are untrusted.
        link = f"{constants.ENDPOINT}/{card.repo}" if card.repo else None
        cards.append({**dataclasses.asdict(card), "link": link})
    return {
        "base": catalogue.base,
        "cards": cards,
        "chosen": list(chosen),
        "limit": MOST_ADAPTERS,
        "fetches": runner.fetches,
        "phase": phase,
        "words": words,
        "found": [
            {"id": one.id, "facts": f"{one.method or 'adapter'}, {one.downloads:,} downloads, licence {one.license}"}
            for one in found
        ],
    }


def build_adapter_picker(demo: gr.Blocks, visitors: Visitors, parts: Parts) -> None:
    """Build the picker, collapsed, and connect it: the chosen adapters replace those on the page."""
    runner = visitors.runner
    own = [column.name for column in runner.engine.columns[1:]]
    # It folds itself: Gradio's Accordion takes its content out of the page while it is closed, and the buttons of the
    # columns need it there.
    picker = component("adapter_picker", value=picker_value(runner, own), elem_id="ml-picker")

    async def value(visitor: Visitor, phase: str, words: str) -> dict:
        # In a thread, because reading a card for the first time hashes the weights.
        return await asyncio.to_thread(picker_value, runner, visitor.adapters(), phase, words)

    def shown(visitor: Visitor) -> dict[Any, Any]:
        return {
            parts.headline: headline(runner.catalogue, visitor.columns()),
            parts.stage: idle_stage(visitor.about(), visitor.own()),
            parts.status: status("idle", "Ready."),
            parts.stop: gr.Button(interactive=False),
        }

    async def choose(event: gr.EventData, request: gr.Request) -> AsyncIterator[dict]:
        visitor = visitors.of(request.session_hash)
        names = [str(name) for name in sent(event).get("names") or ()][: MOST_ADAPTERS + 1]
        yield {picker: await value(visitor, "busy", "Loading adapters…")}
        try:
            await visitor.choose(names)
        except MiniLoraError as error:
            yield {picker: await value(visitor, "error", f"Not changed: {error}.")}
            return
        visitor.blind = False
        done = await value(visitor, "done", f"Now comparing: {', '.join(names)}.")
        yield {picker: done, parts.notice: NO_NOTICE, parts.blind: BLIND_OFF, **shown(visitor)}

    async def search(event: gr.EventData, request: gr.Request) -> AsyncIterator[dict]:
        visitor, text = visitors.of(request.session_hash), str(sent(event).get("text") or "").strip().lower()
        base = runner.catalogue.base
        if not runner.fetches or "/" not in base:
            yield {picker: await value(visitor, "error", f"{base} has no id on the Hub, so nothing can be searched.")}
            return
        yield {picker: await value(visitor, "busy", f"Searching adapters of {base}…")}
        try:
            # Without a token: a visitor must not see what the owner of this machine may.
            listed = await asyncio.to_thread(list_adapters, base, limit=200, token=False)
        except MiniLoraError as error:
            yield {picker: await value(visitor, "error", f"{error}.")}
            return
        found = [one for one in listed if text in one.id.lower()]
        words = f"{len(found)} public adapter{'s' * (len(found) != 1)} of {base} on the Hub"
        words += f", of which the {FOUND} most downloaded are shown." if len(found) > FOUND else "."
        shown_ones = await asyncio.to_thread(picker_value, runner, visitor.adapters(), "idle", words, found[:FOUND])
        yield {picker: shown_ones}

    async def follow_link(request: gr.Request) -> AsyncIterator[dict]:
        name = request.query_params.get("adapter")
        if name is None:
            yield gr.skip()
            return
        visitor = visitors.of(request.session_hash)
        yield {parts.notice: {"phase": "busy", "words": f"Fetching {name[:100]} from the Hub…"}}
        try:
            await visitor.choose([name])
        except MiniLoraError as error:
            yield {parts.notice: {"phase": "error", "words": f"The adapter of this link is not shown: {error}."}}
            return
        notice = {"phase": "shown", "words": f"This link compares {name} with its base."}
        yield {parts.notice: notice, picker: await value(visitor, "idle", ""), **shown(visitor)}

    outputs = [picker, parts.headline, parts.stage, parts.notice, parts.blind, parts.status, parts.stop]
    picker.submit(choose, None, outputs, concurrency_id="link", **QUIET)
    picker.search(search, None, picker, concurrency_id="search", **QUIET)
    demo.load(follow_link, None, outputs, concurrency_id="link", **QUIET)
