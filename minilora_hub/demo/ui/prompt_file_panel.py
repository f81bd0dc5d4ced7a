"""The panel for a file of prompts: upload, progress, table, download."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import gradio as gr

from minilora_hub.demo.runs.kept_runs import KeptRuns, told
from minilora_hub.demo.runs.prompt_file_run import Batch, run_batch
from minilora_hub.demo.runs.prompt_files import KINDS, FileLimits, read_prompts
from minilora_hub.demo.ui.components import QUIET, component
from minilora_hub.demo.ui.layout import Parts
from minilora_hub.demo.ui.settings import sampling_from
from minilora_hub.errors import MiniLoraError


def build_batch(runs: KeptRuns, parts: Parts, limits: FileLimits) -> None:
    """Build it, closed, and connect it; the page's settings and adapters apply."""
    with gr.Accordion("A file of prompts", open=False, elem_id="ml-batch-box"):
        gr.HTML(
            f"<p class='ml-batch-intro'>Up to {limits.rows} prompts: a .txt file with one on each line, or .jsonl or "
            ".csv with a field “prompt”. The settings above apply.</p>",
            apply_default_css=False,
        )
        upload = gr.UploadButton(
            "Choose a file", file_types=[*KINDS], file_count="single", elem_id="ml-batch-file", size="sm", min_width=0
        )
        table = component("batch", value=_value(None), elem_id="ml-batch")

    async def run(request: gr.Request, path, *values) -> AsyncIterator[dict]:
        visitor = request.session_hash or ""
        try:
            prompts = read_prompts(Path(path), limits)
            sampling = sampling_from(*values)
        except (MiniLoraError, ValueError) as error:
            yield _value(None, words=f"Not run: {error}.")
            return
        async for batch in run_batch(runs, visitor, prompts, sampling, told(sampling)):
            yield _value(batch)

    def stop(request: gr.Request) -> None:
        runs.stop(request.session_hash or "")

    def save(value: dict, event: gr.EventData) -> dict:
        kind = (event._data or {}).get("kind")
        batch = Batch(value["names"], value["total"], value["sampling"], value["rows"])
        text, media = (batch.to_csv(), "text/csv") if kind == "csv" else (batch.to_json(), "application/json")
        name = f"minilora-batch.{'csv' if kind == 'csv' else 'json'}"
        return {**value, "download": {"name": name, "type": media, "text": text}}

    upload.upload(run, [upload, *parts.settings.inputs], table, concurrency_id="batch", concurrency_limit=1, **QUIET)
    table.select(save, table, table, queue=False, **QUIET)
    table.submit(stop, None, None, queue=False, **QUIET)


def _value(batch: Batch | None, words: str = "") -> dict:
    if batch is None:
        empty = {"names": [], "rows": [], "total": 0, "sampling": {}}
        return {**empty, "phase": "error" if words else "none", "words": words, "download": None}
    return {
        "names": batch.names,
        "rows": batch.rows,
        "total": batch.total,
        "sampling": batch.sampling,
        "phase": "done" if batch.finished else "busy",
        "words": batch.words,
        "download": None,
    }
