"""The panel under the columns: run again, share, export, the visitor's history, and ``?shared=`` links."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import Any

import gradio as gr
from gradio.events import Dependency

from minilora_hub.demo.runs.comparison import Comparison, exported_json, exported_markdown
from minilora_hub.demo.runs.history import KeptComparison
from minilora_hub.demo.runs.visitor import Visitor, Visitors
from minilora_hub.demo.ui.blind_bar import bar_value
from minilora_hub.demo.ui.components import QUIET, component, sent
from minilora_hub.demo.ui.events import Start
from minilora_hub.demo.ui.layout import Parts
from minilora_hub.demo.ui.page_state import status, with_html
from minilora_hub.errors import PageError

EXPORTS = {"json": ("application/json", exported_json), "md": ("text/markdown", exported_markdown)}


def build_history_panel(
    demo: gr.Blocks, visitors: Visitors, parts: Parts, start: Start, names_shown: Dependency
) -> None:
    """Build the panel and connect it.

    Args:
        demo: the page.
        visitors: whose history it shows.
        parts: the page's other parts.
        start: from `minilora_hub.demo.ui.events.connect_run`.
        names_shown: the event after which the names of a blind comparison may be shown.
    """
    panel = component("history_panel", value=panel_value(None), elem_id="ml-history-box")

    async def follow(request: gr.Request) -> dict:
        return panel_value(visitors.of(request.session_hash))

    def opened(visitor: Visitor, kept: KeptComparison, words: str) -> dict[Any, Any]:
        visitor.show(kept)
        comparison = kept.comparison
        return {
            panel: panel_value(visitor),
            parts.prompt: comparison.prompt,
            **parts.settings.restored(comparison.sampling),
            # A run number that no run of this page has.
            parts.stage: {**with_html(comparison.stage), "run": f"kept-{kept.id}"},
            parts.status: status("idle", words),
            parts.blind: bar_value(visitor),
        }

    async def act(event: gr.EventData, request: gr.Request) -> dict[Any, Any]:
        visitor, action = visitors.of(request.session_hash), sent(event)
        try:
            if action.get("action") == "restore":
                kept = visitor.history.find(str(action.get("id")))
                return opened(visitor, kept, f"From your history, run at {clock(kept.comparison.time)}.")
            if action.get("action") == "share":
                return {panel: panel_value(visitor, shared=await visitor.share())}
            if action.get("kind") in EXPORTS:
                file = download(visitor.history.shown().comparison, action["kind"])
                return {panel: panel_value(visitor, download=file)}
        except PageError as error:
            return {panel: panel_value(visitor, words=f"{error}")}
        return gr.skip()

    async def again(request: gr.Request) -> dict[Any, Any]:
        try:
            comparison = visitors.of(request.session_hash).repeat()
        except PageError:
            return gr.skip()
        return {parts.prompt: comparison.prompt, **parts.settings.restored(comparison.sampling)}

    async def follow_link(request: gr.Request) -> dict[Any, Any]:
        identifier = request.query_params.get("shared")
        if identifier is None:
            return gr.skip()
        try:
            comparison = await asyncio.to_thread(visitors.shared.get, identifier)
        except PageError as error:
            return {parts.notice: {"phase": "error", "words": f"The comparison of this link is not shown: {error}."}}
        kept = KeptComparison(comparison, closed="this is a stored comparison", shared=identifier)
        words = (
            f"A stored comparison, run on {comparison.time[:10]}, {clock(comparison.time)}. "
            "Run starts a new comparison with this page's models."
        )
        shown = opened(visitors.of(request.session_hash), kept, f"Stored. {comparison.status['words']}")
        return {**shown, parts.notice: {"phase": "stored", "words": words}}

    restored = [parts.prompt, parts.settings.system, *parts.settings.inputs]
    outputs = [panel, *restored, parts.stage, parts.status, parts.blind]
    parts.finished.change(follow, None, panel, queue=False, **QUIET)
    names_shown.then(follow, None, panel, queue=False, **QUIET)
    panel.select(act, None, outputs, queue=False, **QUIET)
    start(panel.submit(again, None, restored, queue=False, **QUIET).then, same_seed=True)
    demo.load(follow_link, None, [*outputs, parts.notice], queue=False, **QUIET)


def panel_value(visitor: Visitor | None, **fields: Any) -> dict[str, Any]:
    """Return the panel's value: the history, and whether the shown comparison can be shared and saved."""
    ready, history = False, visitor.history.listed() if visitor else []
    if visitor:
        with suppress(PageError):
            ready = bool(visitor.history.shown())
    listed = [
        {"id": one.id, "prompt": one.comparison.prompt, "time": one.comparison.time, "names": one.comparison.names}
        for one in history
    ]
    return {"ready": ready, "shared": None, "download": None, "words": "", "history": listed, **fields}


def download(comparison: Comparison, kind: str) -> dict[str, str]:
    """Return a file for the browser to save: its name, media type and text."""
    media, write = EXPORTS[kind]
    words = re.sub(r"[^a-z0-9]+", "-", comparison.prompt.lower()[:40]).strip("-") or "comparison"
    return {"name": f"minilora-{words}.{kind}", "type": media, "text": write(comparison)}


def clock(time: str) -> str:
    """Return the time of day of an ISO 8601 time in UTC."""
    return f"{time[11:16]} UTC"
