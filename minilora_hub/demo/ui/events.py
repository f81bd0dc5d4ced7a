"""Event handlers of a comparison: run, run single experts, stop, and close the page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Protocol

import gradio as gr
from gradio.events import Dependency

from minilora_hub.demo.adapters.columns import SoloExperts
from minilora_hub.demo.runs.visitor import Visitors
from minilora_hub.demo.ui.blind_bar import bar_value
from minilora_hub.demo.ui.components import QUIET, sent
from minilora_hub.demo.ui.layout import Parts
from minilora_hub.demo.ui.page_state import Frame, RunningComparison, idle_stage, status
from minilora_hub.demo.ui.settings import next_seed, sampling_from
from minilora_hub.errors import AdapterError, PageError

NO_PROMPT = "Enter a prompt first."


class Start(Protocol):
    """Connects an event to a run of the prompt with the current settings."""

    def __call__(self, event: Callable[..., Dependency], same_seed: bool = False) -> Dependency:
        """Start a run after `event`; `same_seed` keeps the seed of the settings."""


def well_formed(text: str | None) -> str:
    """Replace lone surrogates, which a browser can send and UTF-8 cannot encode."""
    return (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def column_of(event: gr.EventData) -> int:
    """Return the number of the column that an event names; -1 if it names none."""
    column = sent(event).get("column")
    return column if isinstance(column, int) else -1


def connect_run(demo: gr.Blocks, visitors: Visitors, parts: Parts) -> Start:
    """Connect the prompt, its buttons, the examples and single experts; Stop and a closed tab end a comparison."""
    settings = parts.settings

    def show(frame: Frame) -> list:
        # Return the complete stage each time: Gradio sends only the difference from the previous one.
        return [gr.Button(interactive=not frame.finished), frame.status, frame.stage]

    async def begin(request: gr.Request, text, *seed_settings) -> list:
        visitor = visitors.of(request.session_hash)
        if not (text or "").strip():  # what is shown stays
            kept = [gr.skip(), status("error", NO_PROMPT), *[gr.skip()] * 3]
            return [*kept, *[gr.skip()] * bool(seed_settings)]
        seed = []
        if seed_settings:
            greedy, *kept = seed_settings
            seed = [next_seed(greedy and not visitor.samples, *kept)]
        return [*show(visitor.begin(well_formed(text))), None, bar_value(visitor, running=True), *seed]

    async def answer(request: gr.Request, text, system, *values) -> AsyncIterator[list]:
        text, system, visitor = well_formed(text), well_formed(system), visitors.of(request.session_hash)
        if not text.strip():
            yield [gr.skip()] * len(outputs)
            return
        try:
            sampling = sampling_from(*values)
        except ValueError as error:
            yield [*show(RunningComparison(0, visitor.about(), text).refused(str(error))), None]
            return
        async for frame in visitor.run_and_keep(text, sampling, system):
            yield [*show(frame), frame.stage if frame.finished else None]

    async def fill_in(event: gr.EventData) -> str:
        return visitors.examples[int(sent(event)["index"])].prompt

    async def ask_solo(event: gr.EventData, request: gr.Request) -> str:
        try:
            visitors.of(request.session_hash).ask_solo(SoloExperts.read(sent(event)))
        except AdapterError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return well_formed(str(sent(event).get("prompt") or ""))

    async def ask_again(event: gr.EventData, request: gr.Request) -> dict[Any, Any]:
        try:
            comparison = visitors.of(request.session_hash).ask_again(column_of(event))
        except PageError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return {parts.prompt: comparison.prompt}

    async def tune(event: gr.EventData, request: gr.Request) -> dict[Any, Any]:
        visitor, again = visitors.of(request.session_hash), bool(sent(event).get("again"))
        try:
            comparison = visitor.tune(column_of(event), sent(event).get("sampling"), again)
        except PageError as error:
            raise gr.Error(str(error), print_exception=False) from error
        if comparison is not None:
            return {parts.prompt: comparison.prompt}
        words = "The next run uses these settings."
        return {parts.stage: idle_stage(visitor.about(), visitor.own()), parts.status: status("idle", words)}

    async def halt(event: gr.EventData, request: gr.Request) -> None:
        visitors.of(request.session_hash).halt(column_of(event))

    async def follow(event: gr.EventData, request: gr.Request) -> None:
        try:
            visitors.of(request.session_hash).conversation.follow(str(sent(event).get("continues")))
        except PageError as error:
            raise gr.Error(str(error), print_exception=False) from error

    async def stop(request: gr.Request) -> None:
        visitors.of(request.session_hash).stop()

    async def leave(request: gr.Request) -> None:
        visitors.leave(request.session_hash)

    outputs = [parts.stop, parts.status, parts.stage, parts.finished]

    def start(event: Callable[..., Dependency], same_seed: bool = False) -> Dependency:
        inputs = [] if same_seed else [settings.greedy, settings.keep_seed, settings.seed]
        begun = event(begin, [parts.prompt, *inputs], [*outputs, parts.blind, *inputs[2:]], queue=False, **QUIET)
        return begun.then(
            answer,
            [parts.prompt, settings.system, *settings.inputs],
            outputs,
            concurrency_id="compute",
            concurrency_limit=None,  # bounded by `waiting_queue.py`, which also reports the position in the queue
            trigger_mode="always_last",
            **QUIET,
        )

    start(partial(gr.on, [parts.run.click, parts.prompt.submit]))
    start(parts.examples.select(fill_in, None, parts.prompt, queue=False, **QUIET).success)
    # A separate event, because it uses the prompt of the shown comparison, not the text in the input field.
    asked = parts.stage.solo(ask_solo, None, parts.prompt, queue=False, **QUIET)
    start(asked.success, same_seed=True)
    start(parts.stage.again(ask_again, None, [parts.prompt], queue=False, **QUIET).success)
    parts.stage.tune(tune, None, [parts.prompt, parts.stage, parts.status], queue=False, **QUIET)
    start(parts.stage.retune(tune, None, [parts.prompt, parts.stage, parts.status], queue=False, **QUIET).success)
    parts.stage.halt(halt, None, None, queue=False, **QUIET)
    parts.stage.follow(follow, None, None, queue=False, **QUIET)
    parts.stop.click(stop, queue=False, **QUIET)
    demo.unload(leave)
    return start
