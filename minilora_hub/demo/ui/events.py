"""What happens when: a visitor runs, stops, leaves, or comes by a link."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from functools import partial

import gradio as gr
from gradio.events import Dependency

from minilora_hub.demo.adapters.columns import describe_columns, headline
from minilora_hub.demo.runs.kept_runs import KeptRuns
from minilora_hub.demo.runs.runner import LiveRuns
from minilora_hub.demo.runs.solo_experts import Solo
from minilora_hub.demo.ui.blind_bar import begun
from minilora_hub.demo.ui.components import QUIET
from minilora_hub.demo.ui.layout import Parts
from minilora_hub.demo.ui.page_state import Comparison, Frame, idle_stage, status
from minilora_hub.demo.ui.settings import next_seed, sampling_from
from minilora_hub.errors import AdapterError, MiniLoraError


def well_formed(text: str | None) -> str:
    """Replace halves of surrogate pairs, which a browser can send and no answer can say."""
    return (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def visitor(request: gr.Request) -> str:
    """Tell visitors apart: one open page is one visitor."""
    return request.session_hash or ""


def wire_run(demo: gr.Blocks, runs: KeptRuns, parts: Parts) -> Callable[..., Dependency]:
    """A run takes its place at once, then waits in the queue for its turn; Stop and a closed tab end it.

    Returns:
        ``start(event, same_seed=False)``, which runs the prompt and the settings after an event.
    """
    settings = parts.settings

    def show(frame: Frame) -> list:
        # All of the stage each time: Gradio sends only how it differs from the one before.
        return [gr.Button(interactive=not frame.finished), frame.status, frame.stage]

    def begin(greedy, keep_seed, seed, request: gr.Request) -> list:
        return [*begin_again(request), next_seed(greedy, keep_seed, seed)]

    def begin_again(request: gr.Request) -> list:
        return [*show(runs.begin(visitor(request))), None, begun(runs, visitor(request))]

    async def answer(request: gr.Request, text, *values) -> AsyncIterator[list]:
        text = well_formed(text)
        try:
            sampling = sampling_from(*values)
        except ValueError as error:
            refused = Comparison(0, runs.about(visitor(request)), text).refused(str(error))
            yield [*show(refused), None]
            return
        async for frame in runs.run(visitor(request), text, sampling):
            yield [*show(frame), frame.stage if frame.finished else None]

    def end(request: gr.Request) -> None:
        runs.stop(visitor(request))

    def ask_solo(event: gr.EventData, request: gr.Request) -> str:
        told = event._data or {}
        try:
            runs.ask_solo(visitor(request), Solo.read(told))
        except AdapterError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return well_formed(str(told.get("prompt") or ""))

    def leave(request: gr.Request) -> None:
        runs.leave(visitor(request))

    outputs = [parts.stop, parts.status, parts.stage, parts.finished]

    def start(event: Callable[..., Dependency], same_seed: bool = False) -> Dependency:
        if same_seed:
            first = event(begin_again, None, [*outputs, parts.blind], queue=False, **QUIET)
        else:
            inputs = [settings.greedy, settings.keep_seed, settings.seed]
            first = event(begin, inputs, [*outputs, parts.blind, settings.seed], queue=False, **QUIET)
        return first.then(
            answer,
            [parts.prompt, *settings.inputs],
            outputs,
            concurrency_id="compute",
            concurrency_limit=None,  # `live.py` knows who waits, and tells them
            trigger_mode="always_last",
            **QUIET,
        )

    start(partial(gr.on, [parts.run.click, parts.prompt.submit]))
    for chip in parts.examples:
        fill = chip.click(None, None, parts.prompt, js=f"() => {json.dumps(chip.value)}", **QUIET)
        start(fill.then)
    # Its own event, so that it takes the prompt of the comparison that is shown, not one that is half typed.
    asked = parts.stage.solo(ask_solo, None, parts.prompt, queue=False, **QUIET)
    start(asked.success, same_seed=True)
    parts.stop.click(end, queue=False, **QUIET)
    demo.unload(leave)
    return start


def wire_link(demo: gr.Blocks, runs: LiveRuns, parts: Parts) -> None:
    """When the page opens: follow ``?adapter=`` in its address, and say what became of it."""
    unchanged = [gr.skip()] * 3

    async def follow(request: gr.Request) -> AsyncIterator[list]:
        name = request.query_params.get("adapter")
        if name is None:
            yield [gr.skip()] * 4
            return
        yield [{"phase": "busy", "words": f"Fetching {name[:100]} from the Hub…"}, *unchanged]
        try:
            column = await runs.open(visitor(request), name)
        except MiniLoraError as error:
            words = f"The adapter of this link is not shown: {error}."
            yield [{"phase": "error", "words": words}, *unchanged]
            return
        columns = (runs.engine.columns[0], column)
        words = f"{name} beside its base, as your link asked."
        stage = idle_stage(describe_columns(runs.engine, columns))
        yield [
            {"phase": "shown", "words": words},
            headline(runs.engine, columns=columns),
            stage,
            status("idle", "Ready."),
        ]

    demo.load(follow, None, [parts.notice, parts.head, parts.stage, parts.status], concurrency_id="link", **QUIET)
