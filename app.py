"""The Space: the comparison page over the shipped adapters, or over others.

MINILORA_BASE       the base model: "embedded", a folder, or an id on the Hub; default: the one that the adapters name
MINILORA_ADAPTERS   adapter folders or ids on the Hub, separated by commas; default: those under model_cards/
MINILORA_MEASURED   what `minilora eval --out FILE` wrote of these adapters, to show where they differ; default: that of
                    the shipped ones
MINILORA_ROUTE      an index of `minilora route build`: adds a column that its choice answers; default: none
MINILORA_MCP        1: the comparison is also a tool for MCP clients; default: 0
MINILORA_OPENAI     1: the models also answer OpenAI's clients at /v1, as with `minilora serve`; default: 0
MINILORA_API_KEY    the key that clients of /v1 must send; default: none is needed

What visitors and programs may use:

MINILORA_MAX_PROMPT    the most characters of a prompt; default: 8000
MINILORA_MAX_TOKENS    the most new tokens of an answer; default: 512
MINILORA_MAX_ROWS      the most answers of a comparison, the base's included; default: 8
MINILORA_AT_ONCE       comparisons that run together; default: 16
MINILORA_MAX_WAITING   comparisons that wait in the queue; default: 32

A link with ``?adapter=owner/name`` shows that public adapter beside the base:

MINILORA_LINK_MEGABYTES   the most megabytes of one adapter's weights; default: 200
MINILORA_LINK_ADAPTERS    such adapters that stay in memory; default: 8

Votes, shared comparisons and files of prompts:

MINILORA_DATA              folder for votes and shared comparisons; default: the user's folder for data
MINILORA_VOTES_DATASET     a dataset on the Hub that keeps the votes when the disk is lost; needs HF_TOKEN
MINILORA_SHARED            shared comparisons that are kept; default: 2000
MINILORA_SHARED_MEGABYTES  disk space for them, in megabytes; default: 200
MINILORA_KEPT_MEGABYTES    memory for the comparisons of present visitors, in megabytes; default: 500
MINILORA_BATCH_ROWS        the most prompts of one file; default: 50
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from minilora_hub.errors import MiniLoraError
from minilora_hub.quiet import quiet_process


def main() -> None:
    """Load the models, then serve the page until the process ends."""
    from minilora_hub.demo.runs import zero_gpu  # first: on ZeroGPU it must come before torch touches CUDA
    from minilora_hub.bases import resolve_base  # isort: skip
    from minilora_hub.compare.engine import CompareEngine
    from minilora_hub.compare.found_adapters import base_for, shipped_adapters
    from minilora_hub.demo.adapters.from_hub import LinkedAdapters
    from minilora_hub.demo.openai_api import openai_from_environment
    from minilora_hub.demo.runs.limits import PageLimits, flag
    from minilora_hub.demo.runs.scheduled import page_scheduler
    from minilora_hub.demo.ui.app import build_demo, launch

    named = [name.strip() for name in os.environ.get("MINILORA_ADAPTERS", "").split(",") if name.strip()]
    limits, mcp = PageLimits.from_environment(), flag("MINILORA_MCP")
    adapters = named or shipped_adapters()
    limits.check_columns(1 + len(adapters) + bool(os.environ.get("MINILORA_ROUTE")))
    base = base_for(os.environ.get("MINILORA_BASE") or None, adapters, print)
    # On ZeroGPU the models are moved to "cuda" before a GPU is present; each comparison gets one later.
    zero = zero_gpu.is_zero_gpu()
    engine = CompareEngine(base, adapters, device="cuda" if zero else None, keep_bare_logits=not zero, progress=print)
    links = LinkedAdapters(engine, resolve_base(base), limits)
    scheduler = None if zero else page_scheduler(engine, limits)
    openai = openai_from_environment(scheduler)
    files = {name: os.environ.get(f"MINILORA_{name.upper()}") for name in ("measured", "route")}
    named_files = {name: Path(file) for name, file in files.items() if file}
    demo = build_demo(engine, links=links, limits=limits, scheduler=scheduler, **named_files)
    launch(demo, mcp=mcp, openai=openai, engine=engine)


if __name__ == "__main__":
    try:
        with quiet_process():
            main()
    except (MiniLoraError, ValueError) as error:  # a wrong variable is one line in the Space's log
        sys.exit(f"app.py: {error}")
