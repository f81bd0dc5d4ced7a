"""The panel for a file of prompts: upload, progress, and a table of answers that can be saved."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import gradio as gr

from minilora_hub.demo.runs.prompt_files import KINDS, PromptTable, read_prompts, run_prompts
from minilora_hub.demo.runs.visitor import Visitors
from minilora_hub.demo.ui.components import QUIET, component
from minilora_hub.demo.ui.layout import Parts
from minilora_hub.demo.ui.settings import sampling_from
from minilora_hub.errors import MiniLoraError


def build_prompt_file_panel(visitors: Visitors, parts: Parts) -> None:
    """Build the panel, collapsed, and connect it; the page's settings and adapters apply."""
    limits = visitors.runner.limits
    with gr.Accordion("A file of prompts", open=False, elem_id="ml-batch-box"):
        gr.HTML(
            f"<p class='ml-batch-intro'>Up to {limits.file_prompts} prompts: a .txt file with one on each line, or "
            ".jsonl or .csv with a field “prompt” and, where you know the answer, “expected”, or as in promptfoo "
            "“__expected” or “assert” (equals, contains, icontains, starts-with, regex, is-json). The settings above "
            "apply.</p>",
            apply_default_css=False,
        )
        upload = gr.UploadButton(
            "Choose a file", file_types=[*KINDS], file_count="single", elem_id="ml-batch-file", size="sm", min_width=0
        )
        panel = component("prompt_file_panel", value=panel_value(None, "none"), elem_id="ml-batch")

    async def run(request: gr.Request, path, system, *values) -> AsyncIterator[dict]:
        try:
            prompts = read_prompts(Path(path), limits)
            sampling = sampling_from(*values)
        except (MiniLoraError, ValueError) as error:
            yield panel_value(None, "error", f"Not run: {error}.")
            return
        async for table in run_prompts(visitors.of(request.session_hash), prompts, sampling, system or ""):
            yield panel_value(table, "done" if table.finished else "busy", table.words)

    async def stop(request: gr.Request) -> None:
        visitors.of(request.session_hash).stop()

    upload.upload(
        run,
        [upload, parts.settings.system, *parts.settings.inputs],
        panel,
        concurrency_id="batch",
        concurrency_limit=1,
        **QUIET,
    )
    panel.submit(stop, None, None, queue=False, **QUIET)


def panel_value(table: PromptTable | None, phase: str, words: str = "") -> dict:
    """Return the panel's value: the table, its phase (none, busy, done or error), and a message."""
    table = table or PromptTable([], 0, {})
    fields = {
        "names": table.names,
        "rates": table.rates,
        "rows": table.rows,
        "total": table.total,
        "sampling": table.sampling,
    }
    return {**fields, "phase": phase, "words": words}
