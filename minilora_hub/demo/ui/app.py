"""The comparison page in Gradio: a prompt above, one column a model below. Here it is put together and served."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from minilora_hub.errors import MissingExtraError

# Before gradio is imported: nothing on this page may ask another host for anything.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
# Gradio keeps a line on each of the last events, and goes through all of them after each: not through 10,000.
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "200")

try:
    import gradio as gr
except ImportError as error:
    raise MissingExtraError("gradio", "demo") from error

from minilora_hub.compare.engine import CompareEngine
from minilora_hub.demo.adapters.columns import describe_columns, headline
from minilora_hub.demo.adapters.from_hub import LinkedAdapters
from minilora_hub.demo.api import wire_api
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.replay import find_replay
from minilora_hub.demo.ui.board_page import build_board
from minilora_hub.demo.ui.components import STATIC, page_script, page_style
from minilora_hub.demo.ui.events import wire_link, wire_run
from minilora_hub.demo.ui.layout import build_parts
from minilora_hub.demo.ui.page_state import idle_stage, status
from minilora_hub.demo.ui.panels import build_extras, open_memory, open_runs

EXAMPLES = (
    # What the shipped adapters were trained for: items of the test split, one on which they differ …
    "JSON with name, age, city of the dietitian: Joyce Henson of Ebersberg is an ergonomist, while Sara Carey of "
    "Potsdam is a dietitian and 18.",
    "Write as YYYY-MM-DD: the last day of March 1949",
    "Write this in digits: four thousand, nine hundred and seventeen point six three",
    "Write the past participle of: outdo",
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
    limits: PageLimits | None = None,
    data: Path | None = None,
    allowed: Sequence[Path] = (),
) -> gr.Blocks:
    """Build the page for the models of an engine.

    Args:
        engine: the models.
        links: what follows ``?adapter=owner/name`` in the page's address: that adapter is shown beside the base, in
            place of the engine's own. None: such a link is answered with a notice.
        title: the headline. Default: how many answers there are.
        examples: prompts to start from; choosing one runs it.
        max_new_tokens: where the length setting starts.
        limits: what a visitor may ask for, and how many at once.
        data: folder for votes and shared comparisons. Default: ``$MINILORA_DATA``, or the user's folder for data.
        allowed: folders of adapters, which visitors can choose by the name of their folder; never by a path.

    Returns:
        The page, to be handed to `launch`.
    """
    memory = open_memory(data)
    runs = open_runs(engine, links, memory, tuple(allowed), limits)
    with gr.Blocks(title="minilora · compare", analytics_enabled=False, fill_width=True) as demo:
        opening = find_replay(engine) or {
            "stage": idle_stage(describe_columns(engine, engine.columns)),
            "status": status("idle", "Ready."),
        }
        parts = build_parts(headline(engine, title), opening, examples, max_new_tokens, runs.limits.tokens)
        start = wire_run(demo, runs, parts)
        wire_link(demo, runs, parts)
        build_extras(demo, runs, parts, memory, start)
        wire_api(runs)
    build_board(demo, memory.visits)
    return demo


def launch(
    demo: gr.Blocks,
    *,
    host: str | None = None,
    port: int | None = None,
    open_browser: bool = False,
    block: bool = True,
    mcp: bool = False,
) -> str:
    """Serve the page.

    Args:
        demo: from `build_demo`.
        host: address to listen on. Default: ``GRADIO_SERVER_NAME`` if it is set, as on a Space, else this machine only.
        port: port to listen on. Default: ``GRADIO_SERVER_PORT`` if it is set, else the first free one from 7860 on.
        open_browser: open the page in a browser.
        block: stay until interrupted; otherwise return while a thread serves.
        mcp: also serve the comparison as a tool for MCP clients, at ``/gradio_api/mcp/``.

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
        state_session_capacity=200,  # of each visitor it keeps a copy of the page; more than can be at work at once
        max_threads=200,  # also Gradio's bound on runs and those who wait, which `live.py` keeps in a line of its own
        max_file_size="1mb",
        footer_links=[],
        favicon_path=STATIC / "favicon.svg",
        theme=gr.themes.Base(font=SYSTEM_FONTS, font_mono=SYSTEM_MONO, radius_size="sm"),
        head=f"<style>{page_style()}</style><script>{page_script()}</script>",
    )
    if block:
        try:
            threading.Event().wait()
        finally:
            demo.close(verbose=False)
    return address
