"""The bar above the columns: names hidden, votes cast, names shown. The order stays on the server until the vote."""

from __future__ import annotations

import gradio as gr
from gradio.events import Dependency

from minilora_hub.demo.runs.kept_runs import KeptRuns
from minilora_hub.demo.runs.visits import Kept
from minilora_hub.demo.ui.components import QUIET
from minilora_hub.demo.ui.page_state import idle_stage
from minilora_hub.demo.votes.blind import LETTERS, Blindfold, revealed
from minilora_hub.demo.votes.votes import ALL_BAD, TIE
from minilora_hub.errors import PageError

BLIND_OFF = {"phase": "off", "letters": "", "words": ""}
"""A value of the bar: ``phase`` is off, ready, open (a vote can be cast) or told; ``letters`` are those to vote for."""


def view(runs: KeptRuns, visitor: str) -> dict:
    """Return what the bar shows to a visitor, once a comparison has ended."""
    if not runs.is_blind(visitor):
        return BLIND_OFF
    try:
        kept = runs.visits.last(visitor)
    except PageError:
        return _ready()
    if kept.order is None:
        return _ready()
    if kept.closed is None:
        letters = LETTERS[: len(kept.order)]
        return {
            "phase": "open",
            "letters": letters,
            "words": "Which answer is best? The names are shown after your vote.",
        }
    return {"phase": "told", "letters": "", "words": f"No vote: {kept.closed}."}


def begun(runs: KeptRuns, visitor: str) -> dict:
    """Return what the bar shows to a visitor while a comparison runs."""
    return _ready() if runs.is_blind(visitor) else BLIND_OFF


def _ready() -> dict:
    return {"phase": "ready", "letters": "", "words": "Answers come in a random order, without names."}


def thanks(kept: Kept, choice: str) -> dict:
    """Return what the bar shows after a vote."""
    order = kept.order or ()
    if choice in (TIE, ALL_BAD):
        what = "a tie" if choice == TIE else "all bad"
    else:
        what = f"{LETTERS[int(choice)]}, which was {kept.record.names[order[int(choice)]]}"
    return {"phase": "told", "letters": "", "words": f"Your vote is stored: {what}."}


def wire_blind(runs: KeptRuns, bar: gr.HTML, stage: gr.HTML, finished: gr.State) -> Dependency:
    """Connect the bar: it switches, takes votes, and follows what has been run.

    Args:
        runs: the visitors' runs.
        bar: from the layout.
        stage: the columns.
        finished: changes when a comparison has ended.

    Returns:
        The event of somebody who acts on the bar.
    """

    def switch(visitor: str, blind: bool) -> list:
        runs.make_blind(visitor, blind)
        try:
            kept = runs.visits.last(visitor)
        except PageError:  # nothing was run: the columns lose or get their names at once
            idle = idle_stage(runs.about(visitor))
            order = tuple(range(len(idle["columns"])))
            return [_ready(), Blindfold(order).stage(idle)] if blind else [BLIND_OFF, idle]
        if blind or kept.closed:
            return [_ready() if blind else BLIND_OFF, gr.skip()]
        runs.visits.give_up(visitor)
        return [BLIND_OFF, revealed(kept.record.stage, kept.order or ())]

    def act(event: gr.EventData, request: gr.Request) -> list:
        visitor, told = request.session_hash or "", event._data or {}
        if told.get("action") == "switch":
            return switch(visitor, bool(told.get("blind")))
        try:
            if told.get("action") == "reveal":
                kept = runs.visits.give_up(visitor)
                bar_value = {"phase": "told", "letters": "", "words": "Names shown without a vote."}
            else:
                choice = str(told.get("choice"))
                kept = runs.visits.vote(visitor, choice)
                bar_value = thanks(kept, choice)
        except PageError as error:
            return [{**view(runs, visitor), "words": f"{error}"}, gr.skip()]
        return [bar_value, revealed(kept.record.stage, kept.order or ())]

    def follow(ended: dict | None, request: gr.Request) -> dict:
        visitor = request.session_hash or ""
        return begun(runs, visitor) if ended is None else view(runs, visitor)

    finished.change(follow, finished, bar, queue=False, **QUIET)
    return bar.select(act, None, [bar, stage], queue=False, **QUIET)
