"""The comparison page in Gradio: a prompt above, one column a model below. It lays out and wires; `live.py` works."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

# Before gradio is imported: nothing on this page may ask another host for anything.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

try:
    import gradio as gr
except ImportError as error:
    from minilora_hub.errors import MissingExtraError

    raise MissingExtraError("gradio", "demo") from error

from minilora_hub.compare.engine import Column, CompareEngine, Sampling
from minilora_hub.demo.linked import LinkedAdapters
from minilora_hub.demo.live import Frame, LiveRuns
from minilora_hub.errors import MiniLoraError

HERE = Path(__file__).parent
NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
EXAMPLES = (
    # What the shipped adapters were trained for, with names, cities and years that they never saw …
    "Write this date as YYYY-MM-DD: the nineteenth of February 1990",
    "Write a JSON record with name, age, city and job: Maria, 41, works as a pilot in Lisbon.",
    "Write this number in digits: seven thousand eight hundred and ten",
    # … and what they were not.
    "Why is the sky blue?",
)
SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
SYSTEM_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build_demo(
    engine: CompareEngine,
    *,
    links: LinkedAdapters | None = None,
    title: str | None = None,
    examples: Sequence[str] = EXAMPLES,
    max_new_tokens: int = 96,
) -> gr.Blocks:
    """Build the page for the models of an engine.

    Args:
        engine: the models.
        links: what follows ``?adapter=owner/name`` in the page's address: that adapter is shown beside the base, in
            place of the engine's own. None: such a link is answered with a notice.
        title: the headline. Default: how many answers there are.
        examples: prompts to start from; choosing one runs it.
        max_new_tokens: where the length setting starts.

    Returns:
        The page, to be handed to `launch`.
    """
    runs = LiveRuns(engine, links)
    with gr.Blocks(title="minilora · compare", analytics_enabled=False, fill_width=True) as demo:
        head = _html("head", value=_head(engine, title))
        notice = _html("notice", value={"phase": "none", "words": ""}, elem_id="ml-notice")
        with gr.Row(elem_id="ml-ask"):
            prompt = gr.Textbox(
                show_label=False,
                label="Prompt",
                placeholder="Ask all of them something…",
                lines=1,
                max_lines=8,
                max_length=8000,
                container=False,
                scale=8,
                min_width=260,
                elem_id="ml-prompt",
            )
            with gr.Row(elem_id="ml-buttons", scale=1):
                run = gr.Button("Run", variant="primary", elem_id="ml-run", min_width=110)
                stop = gr.Button("Stop", interactive=False, elem_id="ml-stop", min_width=110)
        with gr.Row(elem_id="ml-examples"):
            chips = [gr.Button(example, size="sm", min_width=0, elem_classes="ml-chip") for example in examples]
        with gr.Accordion("Settings", open=False, elem_id="ml-settings"), gr.Row():
            settings = [
                gr.Slider(1, 512, max_new_tokens, step=1, label="Max new tokens", min_width=200),
                gr.Slider(0, 2, 0, step=0.05, label="Temperature (0 is greedy)", min_width=200),
                gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", min_width=200),
                gr.Number(0, precision=0, minimum=0, label="Seed", min_width=120),
            ]
        status = _html("status", value={"phase": "idle", "words": "Ready.", "count": ""}, elem_id="ml-status")
        with gr.Row(elem_id="ml-columns"):
            base, *adapters = _about(engine, engine.columns)
            columns = [_column(base), _column({}, visible=False), *(_column(about) for about in adapters)]
        pictures = [picture for _, picture in columns]
        _wire(demo, runs, prompt, run, stop, chips, settings, status, pictures)
        _wire_link(demo, runs, head, notice, columns)
    return demo


def _wire(demo, runs, prompt, run, stop, chips, settings, status, columns) -> None:
    """Connect the page's parts: a run takes its place at once, then waits in the queue for its turn."""

    def show(frame: Frame, running: bool) -> list:
        base, *adapters = [gr.skip() if picture is None else picture for picture in frame.columns]
        # On the page the column of a linked adapter follows the base's; what is not of this run stays as it is.
        rest = [gr.skip()] * (len(columns) - 2)
        pictures = [base, *adapters, *rest] if frame.linked else [base, gr.skip(), *adapters]
        return [gr.Button(interactive=running), frame.status, *pictures]

    def begin(request: gr.Request) -> list:
        return show(runs.begin(request.session_hash), running=True)

    async def answer(text, tokens, temperature, top_p, seed, request: gr.Request) -> AsyncIterator[list]:
        try:
            sampling = Sampling(int(tokens), float(temperature), float(top_p), seed=int(seed or 0))
        except ValueError as error:
            idle = runs.begin(request.session_hash)
            status = {"phase": "error", "words": str(error), "count": ""}
            yield show(dataclasses.replace(idle, status=status), running=False)
            return
        async for frame in runs.run(request.session_hash, text, sampling):
            yield show(frame, running=not frame.finished)

    def end(request: gr.Request) -> None:
        runs.stop(request.session_hash)

    def leave(request: gr.Request) -> None:
        runs.leave(request.session_hash)

    outputs = [stop, status, *columns]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    starts = [gr.on([run.click, prompt.submit], begin, None, outputs, queue=False, **quiet)]
    for chip in chips:
        fill = chip.click(None, None, prompt, js=f"() => {json.dumps(chip.value)}", **quiet)
        starts.append(fill.then(begin, None, outputs, queue=False, **quiet))
    for start in starts:
        start.then(
            answer,
            [prompt, *settings],
            outputs,
            concurrency_id="compute",
            concurrency_limit=1,
            trigger_mode="always_last",
            **quiet,
        )
    stop.click(end, queue=False, **quiet)
    demo.unload(leave)


def _wire_link(demo, runs, head, notice, columns) -> None:
    """When the page opens: follow ``?adapter=`` in its address, and say what became of it."""
    boxes, pictures = zip(*columns, strict=True)
    outputs = [notice, head, *boxes, pictures[1]]
    unchanged = [gr.skip()] * (len(outputs) - 1)

    async def follow(request: gr.Request) -> AsyncIterator[list]:
        name = request.query_params.get("adapter")
        if name is None:
            yield [gr.skip(), *unchanged]
            return
        yield [{"phase": "busy", "words": f"Fetching {name[:100]} from the Hub…"}, *unchanged]
        try:
            column = await runs.open(request.session_hash, name)
        except MiniLoraError as error:
            yield [{"phase": "error", "words": f"The adapter of this link is not shown: {error}."}, *unchanged]
            return
        columns = (runs.engine.columns[0], column)
        about = _about(runs.engine, columns)[1]
        words = f"{name} beside its base, as your link asked."
        shown = [gr.Column(visible=index < 2) for index in range(len(boxes))]
        head_line = _head(runs.engine, columns=columns)
        yield [{"phase": "shown", "words": words}, head_line, *shown, gr.HTML(value={}, column=about)]

    demo.load(follow, None, outputs, concurrency_id="link", show_progress="hidden", api_visibility="private")


def _html(name: str, **arguments) -> gr.HTML:
    """Build a component out of ``<name>.html`` and ``<name>.js``; values reach it as text only."""
    return gr.HTML(
        html_template=_read(f"{name}.html"), js_on_load=_read(f"{name}.js"), apply_default_css=False, **arguments
    )


def _column(about: dict, *, visible: bool = True) -> tuple[gr.Column, gr.HTML]:
    with gr.Column(min_width=300, elem_classes="ml-column", visible=visible) as box:
        return box, _html("column", value={}, column=about)


def _head(engine: CompareEngine, title: str | None = None, *, columns: Sequence[Column] | None = None) -> dict:
    amount = len(engine.columns if columns is None else columns)
    answers = NUMBERS[amount] if amount < len(NUMBERS) else amount
    return {"title": title or f"Same prompt. {answers} answers. One base.", "facts": _memory_line(engine)}


def _about(engine: CompareEngine, columns: Sequence[Column]) -> list[dict]:
    """Describe each column in one line, and give it a letter."""
    base_size = sum(parameter.numel() for parameter in engine.bank.model.parameters())
    seen: Counter[str] = Counter()
    described = []
    for column in columns:
        seen[column.kind] += 1
        facts: list[str] = [column.kind]
        if column.parameters_added:
            share = column.parameters_added / base_size
            facts.append(f"+{_count(column.parameters_added)} parameters ({share:.1%})")
        if column.detail:
            facts.append(column.detail)
        badge = column.kind[0].upper() + (str(seen[column.kind]) if seen[column.kind] > 1 else "")
        described.append({"name": column.name, "kind": column.kind, "badge": badge, "facts": " · ".join(facts)})
    return described


def _memory_line(engine: CompareEngine) -> str:
    memory = engine.memory()
    adapters = f"; its adapters add {_bytes(memory.adapters)}" if memory.adapters else ""
    return f"{engine.columns[0].name} is in memory once: {_bytes(memory.base)}{adapters}."


def _count(value: int) -> str:
    return f"{value / 1e6:.1f} M" if value >= 1e5 else f"{value:,}"


def _bytes(value: int) -> str:
    return (
        f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB" if value < 1e7 else f"{value / 1e6:.0f} MB"
    )


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def launch(
    demo: gr.Blocks, *, host: str | None = None, port: int | None = None, open_browser: bool = False, block: bool = True
) -> str:
    """Serve the page.

    Args:
        demo: from `build_demo`.
        host: address to listen on. Default: ``GRADIO_SERVER_NAME`` if it is set, as on a Space, else this machine only.
        port: port to listen on. Default: ``GRADIO_SERVER_PORT`` if it is set, else the first free one from 7860 on.
        open_browser: open the page in a browser.
        block: stay until interrupted; otherwise return while a thread serves.

    Returns:
        The page's address.

    Raises:
        OSError: the port is in use.
    """
    _, address, _ = demo.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        favicon_path=HERE / "favicon.svg",
        theme=gr.themes.Base(font=SYSTEM_FONTS, font_mono=SYSTEM_MONO, radius_size="sm"),
        # Not css=: Gradio rewrites the selectors of what it is given there, and the media queries fall behind.
        head=f"<style>{_read('page.css')}</style>",
    )
    if block:
        try:
            threading.Event().wait()
        finally:
            demo.close()
    return address
