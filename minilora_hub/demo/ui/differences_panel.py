"""The panel of measured items on which two adapters differ, with the base's answer and the routing beside them."""

from __future__ import annotations

import asyncio
from typing import Any

import gradio as gr

from minilora_hub.demo.runs.measured_answers import MeasuredAnswers
from minilora_hub.demo.ui.components import QUIET, component, sent
from minilora_hub.demo.ui.events import Start, well_formed
from minilora_hub.demo.ui.layout import Parts

UNREAD: dict[str, Any] = {"phase": "unread", "error": ""}


def build_differences_panel(measured: MeasuredAnswers, parts: Parts, start: Start) -> None:
    """Build the panel, collapsed, and connect it: it is filled when it is opened, and runs an item's prompt.

    Args:
        measured: the answers.
        parts: the page's other parts.
        start: from `minilora_hub.demo.ui.events.connect_run`.
    """
    panel = component("differences", value=UNREAD, elem_id="ml-differences")

    async def show(event: gr.EventData, now: dict) -> dict:
        try:
            # In a thread, because it compares all items.
            return {"phase": "shown", "error": "", **await asyncio.to_thread(measured.view, sent(event))}
        except ValueError as error:
            return {**now, "error": f"{error}"}

    async def fill_in(event: gr.EventData) -> str:
        return well_formed(str(sent(event).get("prompt") or ""))

    panel.select(show, panel, panel, queue=False, **QUIET)
    start(panel.submit(fill_in, None, parts.prompt, queue=False, **QUIET).success)
