"""Build and serve the comparison page in Gradio: a prompt, and below it a column for each model."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from platformdirs import user_data_path

from minilora_hub.errors import MissingExtraError

# Set before gradio is imported, because this page makes no request to any other host.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# Gradio keeps the latest events (10,000 by default) and scans all of them after each event.
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "200")

try:
    import gradio as gr
except ImportError as error:
    raise MissingExtraError("gradio", "demo") from error

from minilora_hub.compare.engine import CompareEngine
from minilora_hub.demo.adapters.catalogue import Catalogue
from minilora_hub.demo.adapters.columns import describe_columns, headline
from minilora_hub.demo.adapters.from_hub import LinkedAdapters
from minilora_hub.demo.agents import agents_route
from minilora_hub.demo.api import add_api
from minilora_hub.demo.runs.auto_column import AutoColumn
from minilora_hub.demo.runs.examples import EXAMPLES, Example
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.measured_answers import find_measured
from minilora_hub.demo.runs.replay import find_replay
from minilora_hub.demo.runs.runner import Runner
from minilora_hub.demo.runs.visitor import Visitor, Visitors
from minilora_hub.demo.ui.adapter_picker import build_adapter_picker
from minilora_hub.demo.ui.base_panel import build_base_panel
from minilora_hub.demo.ui.blind_bar import build_board, connect_blind_bar
from minilora_hub.demo.ui.components import STATIC, page_head
from minilora_hub.demo.ui.differences_panel import build_differences_panel
from minilora_hub.demo.ui.events import connect_run
from minilora_hub.demo.ui.history_panel import build_history_panel
from minilora_hub.demo.ui.layout import build_parts
from minilora_hub.demo.ui.page_state import idle_stage, status
from minilora_hub.demo.ui.prompt_file_panel import build_prompt_file_panel
from minilora_hub.demo.votes.hub_dataset import open_votes
from minilora_hub.demo.votes.sharing import SharedComparisons
from minilora_hub.demo.votes.voted_answers import VotedAnswersFile
from minilora_hub.serving.scheduler import Scheduler

SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
SYSTEM_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def build_demo(
    engine: CompareEngine,
    *,
    links: LinkedAdapters | None = None,
    title: str | None = None,
    examples: Sequence[Example | str] = EXAMPLES,
    max_new_tokens: int = 96,
    limits: PageLimits | None = None,
    data: Path | None = None,
    allowed: Sequence[Path] = (),
    measured: Path | None = None,
    route: Path | None = None,
    voted: VotedAnswersFile | None = None,
    scheduler: Scheduler | None = None,
) -> gr.Blocks:
    """Build the page for the models of an engine.

    Args:
        engine: the models.
        links: downloads adapters requested by ``?adapter=owner/name`` in the page's URL or by the picker. None: the
            page shows only the engine's own.
        title: the headline. Default: the number of answers.
        examples: example prompts, with the right answers where they have one; choosing one runs it.
        max_new_tokens: initial value of the length setting.
        limits: limits on visitors' requests. Default: from the environment.
        data: folder for votes and shared comparisons. Default: ``$MINILORA_DATA``, or the user's folder for data.
        allowed: folders whose adapter folders visitors can choose by name, never by path.
        measured: what `minilora eval --out` has written of these adapters, to show where they differ. Default: the
            answers of the shipped adapters.
        route: an index of `minilora route build`, which chooses the adapter of one more column for each prompt.
        voted: stores the texts that are voted on, for training; only for a page of one's own.
        scheduler: computes the rows of all visitors, and of OpenAI's API if that is served as well; from
            `page_scheduler`. Default: one of the page's own.

    Returns:
        The page, for `launch`.
    """
    limits = limits or PageLimits.from_environment()
    offered = [Example(one) if isinstance(one, str) else one for one in examples]
    folder = data or data_folder()
    # Votes of a page that stores texts stay beside those: a later page with a dataset does not find their prompts.
    votes, dataset = open_votes((voted.folder if voted else folder) / "votes")
    if dataset:
        dataset.start()
    catalogue = Catalogue(engine, links, allowed)
    auto = AutoColumn(engine, route, catalogue.weights(())[0].hash) if route else None
    runner = Runner(engine, catalogue, limits, auto, scheduler)
    answers = find_measured(measured, catalogue)
    visitors = Visitors(runner, votes, SharedComparisons(folder / "shared", limits), offered, voted)
    visitors.expected = (answers.expected if answers else {}) | visitors.expected
    with gr.Blocks(title="minilora · compare", analytics_enabled=False, fill_width=True) as demo:
        shown = Visitor(visitors).columns()
        opening = (find_replay(engine) if auto is None else None) or {
            "stage": idle_stage(describe_columns(catalogue, shown)),
            "status": status("idle", "Ready."),
        }
        head = headline(catalogue, shown, title)
        parts = build_parts(head, opening, offered, max_new_tokens, limits.tokens)
        start = connect_run(demo, visitors, parts)
        names_shown = connect_blind_bar(visitors, parts.blind, parts.stage, parts.finished)
        build_history_panel(demo, visitors, parts, start, names_shown)
        build_adapter_picker(demo, visitors, parts)
        if answers:
            build_differences_panel(answers, parts, start)
        build_prompt_file_panel(visitors, parts)
        build_base_panel(runner)
        add_api(runner)
    build_board(demo, votes, offered)
    return demo


def data_folder() -> Path:
    """Return the folder for votes and shared comparisons: ``$MINILORA_DATA``, or the user's folder for data."""
    chosen = os.environ.get("MINILORA_DATA")
    return Path(chosen).expanduser() if chosen else user_data_path("minilora_hub", appauthor=False)


def launch(
    demo: gr.Blocks,
    *,
    host: str | None = None,
    port: int | None = None,
    open_browser: bool = False,
    block: bool = True,
    mcp: bool = False,
    openai: dict[str, Any] | None = None,
    engine: CompareEngine | None = None,
    ready: Callable[[], None] = lambda: None,
) -> str:
    """Serve the page.

    Args:
        demo: from `build_demo`.
        host: address to listen on. Default: ``GRADIO_SERVER_NAME`` if it is set, as on a Space, else this machine only.
        port: port to listen on. Default: ``GRADIO_SERVER_PORT`` if it is set, else the first free one from 7860 on.
        open_browser: open the page in a browser.
        block: block until interrupted; otherwise serve in a thread and return.
        mcp: also serve the comparison as a tool for MCP clients, at ``/gradio_api/mcp/``.
        openai: arguments that add OpenAI's API at ``/v1``, from `openai_from_environment`.
        engine: the page's models, which ``/agents.md`` lists. None: there is no such page.
        ready: with `block`, called once the page can be opened.

    Returns:
        The page's address.

    Raises:
        MissingExtraError: `mcp` is asked for and its package is not installed.
        OSError: the port is in use.
    """
    if mcp and find_spec("mcp") is None:
        raise MissingExtraError("mcp", "mcp")
    _, address, _ = demo.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        run_history=False,
        mcp_server=mcp,
        app_kwargs={"routes": [agents_route(demo, engine, mcp)] if engine else [], **(openai or {})},
        state_session_capacity=200,  # sessions whose state is kept; more than can run and wait
        max_threads=200,  # also bounds running and waiting comparisons; the limits of `waiting_queue.py` are lower
        max_file_size="1mb",
        footer_links=["api"],  # without it there is no /?view=api
        favicon_path=STATIC / "favicon.svg",
        theme=gr.themes.Base(font=SYSTEM_FONTS, font_mono=SYSTEM_MONO, radius_size="sm"),
        head=page_head(),
    )
    if block:
        try:
            ready()
            threading.Event().wait()
        finally:
            demo.close(verbose=False)
    return address
