"""What stands around the comparison: voting, the Board page, history, export, links, batches, the adapter picker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from gradio.events import Dependency

from minilora_hub.compare.engine import CompareEngine
from minilora_hub.demo.adapters.catalogue import Catalogue
from minilora_hub.demo.adapters.from_hub import LinkedAdapters
from minilora_hub.demo.runs.kept_runs import KeptRuns
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.prompt_files import FileLimits
from minilora_hub.demo.runs.visits import KeptLimits, Visits
from minilora_hub.demo.ui.adapter_picker import build_picker, wire_picker
from minilora_hub.demo.ui.blind_bar import wire_blind
from minilora_hub.demo.ui.history_panel import build_keeping, wire_keeping
from minilora_hub.demo.ui.layout import Parts
from minilora_hub.demo.ui.prompt_file_panel import build_batch
from minilora_hub.demo.votes.hub_dataset import VoteSync, open_votes
from minilora_hub.demo.votes.sharing import SharedComparisons, ShareLimits
from platformdirs import user_data_path


@dataclass(frozen=True)
class Memory:
    """What outlives a comparison.

    Attributes:
        visits: what was run for whom; votes and shared comparisons.
        sync: what keeps the votes on the Hub, None where they stay on this machine.
        batch: what a file of prompts may hold.
    """

    visits: Visits
    sync: VoteSync | None
    batch: FileLimits


def open_memory(folder: Path | None = None, say: Callable[[str], object] = print) -> Memory:
    """Open it; nothing is made on disk before the first vote or the first shared comparison.

    Args:
        folder: where votes and shared comparisons are. Default: ``$MINILORA_DATA``, or the user's folder for data.
        say: called with a line of text when votes cannot be sent to the Hub.

    Raises:
        ValueError: an environment variable is wrong; the message names it.
    """
    folder = folder or data_folder()
    votes, sync = open_votes(folder / "votes", say)
    shared = SharedComparisons(folder / "shared", ShareLimits.from_environment())
    return Memory(Visits(votes, shared, KeptLimits.from_environment()), sync, FileLimits.from_environment())


def open_runs(
    engine: CompareEngine,
    links: LinkedAdapters | None,
    memory: Memory,
    allowed: tuple[Path, ...] = (),
    limits: PageLimits | None = None,
) -> KeptRuns:
    """Build what runs comparisons and remembers them.

    Args:
        engine: the models.
        links: what fetches and keeps adapters that visitors name.
        memory: from `open_memory`.
        allowed: folders of adapters that visitors may choose from.
        limits: see `minilora_hub.demo.runs.runner.LiveRuns`.
    """
    if memory.sync:
        memory.sync.start()
    return KeptRuns(engine, links, memory.visits, Catalogue(engine, links, allowed), limits)


def build_extras(
    demo: gr.Blocks, runs: KeptRuns, parts: Parts, memory: Memory, start: Callable[..., Dependency]
) -> None:
    """Build them below the columns, inside the open page; `parts.finished.change` tells that a comparison has ended.

    Args:
        demo: the page.
        runs: runs comparisons.
        parts: what is there already, and wired.
        memory: from `open_memory`.
        start: from `minilora_hub.demo.ui.events.wire_run`.
    """
    keeping = build_keeping()
    picker = build_picker(runs)
    build_batch(runs, parts, memory.batch)
    names_shown = wire_blind(runs, parts.blind, parts.stage, parts.finished)
    wire_keeping(demo, runs, parts, keeping, start, names_shown)
    wire_picker(runs, parts, picker)
