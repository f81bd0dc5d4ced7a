"""Below the columns: run again, share, export, and what this visitor has run so far."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.events import Dependency

from minilora_hub.demo.runs.comparison import Record, exported_json, exported_markdown
from minilora_hub.demo.runs.kept_runs import KeptRuns
from minilora_hub.demo.runs.visits import Kept
from minilora_hub.demo.ui.blind_bar import view
from minilora_hub.demo.ui.components import QUIET, component
from minilora_hub.demo.ui.layout import Parts
from minilora_hub.demo.ui.page_state import status
from minilora_hub.demo.ui.settings import restored
from minilora_hub.errors import PageError

EXPORTS = {
    "json": ("application/json", exported_json),
    "md": ("text/markdown", exported_markdown),
}


def build_keeping() -> gr.HTML:
    """Build the row of buttons and the history under it."""
    return component("keeping", value=_value(), elem_id="ml-keeping")


def _value(**fields: Any) -> dict:
    empty: dict[str, Any] = {"ready": False, "shared": None, "download": None, "words": "", "history": []}
    return empty | fields


def wire_keeping(
    demo: gr.Blocks,
    runs: KeptRuns,
    parts: Parts,
    keeping: gr.HTML,
    start: Callable[..., Dependency],
    names_shown: Dependency,
) -> None:
    """Connect it.

    Args:
        demo: the page.
        runs: the visitors' runs.
        parts: the page's other parts.
        keeping: from `build_keeping`.
        start: from `minilora_hub.demo.ui.events.wire_run`.
        names_shown: the event after which the names of a blind comparison may be shown.
    """
    visits = runs.visits
    opened = [keeping, parts.prompt, *parts.settings.inputs, parts.stage, parts.status, parts.blind]

    def value(visitor: str, **fields: Any) -> dict:
        history = [
            {"id": kept.id, "prompt": kept.record.prompt, "time": kept.record.time, "names": kept.record.names}
            for kept in visits.history(visitor)
        ]
        try:
            visits.shown(visitor)
        except PageError as error:
            return _value(history=history, words=f"{error}" if fields else "")
        return _value(ready=True, history=history, **fields)

    def follow(request: gr.Request) -> dict:
        return value(request.session_hash or "")

    def open_record(visitor: str, kept: Kept, words: str) -> list:
        visits.show(visitor, kept)
        line = status("idle", words)
        record = kept.record
        bar = view(runs, visitor)
        return [value(visitor), record.prompt, *restored(record.sampling), stage_of(record, kept.id), line, bar]

    def act(event: gr.EventData, request: gr.Request) -> list:
        visitor, told = request.session_hash or "", event._data or {}
        nothing = [gr.skip()] * (len(opened) - 1)
        try:
            action = told.get("action")
            if action == "restore":
                kept = visits.find(visitor, str(told.get("id")))
                return open_record(visitor, kept, f"From your history, run at {clock(kept.record.time)}.")
            if action == "share":
                return [value(visitor, shared=visits.share(visits.shown(visitor))), *nothing]
            if action == "export" and told.get("kind") in EXPORTS:
                return [value(visitor, download=download(visits.shown(visitor).record, told["kind"])), *nothing]
        except PageError as error:
            return [{**value(visitor), "words": f"{error}"}, *nothing]
        return [gr.skip(), *nothing]

    def again(request: gr.Request) -> list:
        try:
            record = visits.last(request.session_hash or "").record
        except PageError:
            return [gr.skip()] * (1 + len(parts.settings.inputs))
        return [record.prompt, *restored(record.sampling)]

    def arrive(request: gr.Request) -> list:
        identifier = request.query_params.get("shared")
        nothing = [gr.skip()] * len(opened)
        if identifier is None:
            return [*nothing, gr.skip()]
        try:
            record = visits.shared.get(identifier)
        except PageError as error:
            return [*nothing, {"phase": "error", "words": f"The comparison of this link is not shown: {error}."}]
        kept = Kept(record, closed="it is a stored comparison", shared=identifier)
        day = f"{record.time[:10]}, {clock(record.time)}"
        words = f"A stored comparison, run on {day}. Run starts a new one, with what is on this page."
        notice = {"phase": "stored", "words": words}
        return [*open_record(request.session_hash or "", kept, f"Stored. {record.status['words']}"), notice]

    parts.finished.change(follow, None, keeping, queue=False, **QUIET)
    names_shown.then(follow, None, keeping, queue=False, **QUIET)
    keeping.select(act, None, opened, queue=False, **QUIET)
    repeated = keeping.submit(again, None, [parts.prompt, *parts.settings.inputs], queue=False, **QUIET)
    start(repeated.then, same_seed=True)
    demo.load(arrive, None, [*opened, parts.notice], queue=False, **QUIET)


def stage_of(record: Record, identifier: str) -> dict:
    """Return a record's stage, as one that no run of this page has the number of."""
    return {**record.stage, "run": f"kept-{identifier}"}


def download(record: Record, kind: str) -> dict:
    """Return a file for the browser to save: its name, media type and text."""
    media, write = EXPORTS[kind]
    words = re.sub(r"[^a-z0-9]+", "-", record.prompt.lower()[:40]).strip("-") or "comparison"
    return {"name": f"minilora-{words}.{kind}", "type": media, "text": write(record)}


def clock(time: str) -> str:
    """Return the time of the day out of an ISO 8601 time in UTC."""
    return f"{time[11:16]} UTC"
