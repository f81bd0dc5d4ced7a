"""Blind voting: the bar above the columns with the switch and the votes, and the Board, a page with the ranking.

The value of the bar is ``{"phase", "letters", "words"}``: the phase is off, ready, open (a vote can be cast) or closed,
``letters`` are the answers to vote for, and ``words`` is the message. After a vote it may have a ``command``, which
trains on the votes.
"""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr
from gradio.events import Dependency

from minilora_hub.demo.runs.examples import Example
from minilora_hub.demo.runs.history import KeptComparison
from minilora_hub.demo.runs.visitor import Visitor, Visitors
from minilora_hub.demo.ui.components import QUIET, component, sent
from minilora_hub.demo.ui.page_state import idle_stage
from minilora_hub.demo.votes.blind import LETTERS, Blindfold, revealed
from minilora_hub.demo.votes.ranking import rankings, votes_needed
from minilora_hub.demo.votes.voted_answers import VotedAnswersFile
from minilora_hub.demo.votes.votes import ALL_BAD, TIE, VoteStore
from minilora_hub.errors import PageError
from minilora_hub.formatting import counted

BLIND_OFF = {"phase": "off", "letters": "", "words": ""}
READY = {
    "phase": "ready",
    "letters": "",
    "words": "Answers come in a random order, without names, all with the common settings.",
}


def bar_value(visitor: Visitor, running: bool = False) -> dict:
    """Return the bar's value, while a comparison is `running` or after the last one has ended."""
    if not visitor.blind:
        return BLIND_OFF
    try:
        kept = visitor.history.last()
    except PageError:
        return READY
    if running or kept.order is None:
        return READY
    if kept.closed:
        return _closed(f"No vote: {kept.closed}.")
    words = "Which answer is best? The names are shown after your vote."
    if visitor.stores_texts:
        words += " It stores prompt and answers on this machine, for training."
    return {"phase": "open", "letters": LETTERS[: len(kept.order)], "words": words}


def _closed(words: str) -> dict:
    return {"phase": "closed", "letters": "", "words": words}


def _thanks(kept: KeptComparison, choice: str, voted: VotedAnswersFile | None) -> dict:
    if choice in (TIE, ALL_BAD):
        what = "a tie" if choice == TIE else "all bad"
    else:
        what = f"{LETTERS[int(choice)]}, which was {kept.comparison.names[(kept.order or ())[int(choice)]]}"
    words = f"Your vote is stored: {what}."
    if voted is None:
        return _closed(words)
    more, command = voted.next_step()
    return {**_closed(f"{words} {more}"), "command": command}


def connect_blind_bar(visitors: Visitors, bar: gr.HTML, stage: gr.HTML, finished: gr.State) -> Dependency:
    """Connect the bar's switch and its votes, and update it when a comparison has `finished`.

    Returns:
        The event that fires when a visitor uses the bar.
    """

    def switch(visitor: Visitor, blind: bool) -> list:
        visitor.blind = blind
        try:
            kept = visitor.history.last()
        except PageError:  # nothing was run yet: hide or show the names at once
            idle = idle_stage(visitor.about(), visitor.own())
            return [READY, Blindfold(range(len(idle["columns"]))).stage(idle)] if blind else [BLIND_OFF, idle]
        if blind or kept.closed:
            return [READY if blind else BLIND_OFF, gr.skip()]
        return [BLIND_OFF, reveal(visitor)]

    def reveal(visitor: Visitor) -> dict:
        kept = visitor.history.close_last("the names were shown before a vote")
        return revealed(kept.comparison.stage, kept.order or ())

    async def act(event: gr.EventData, request: gr.Request) -> list:
        visitor, action = visitors.of(request.session_hash), sent(event).get("action")
        if action == "switch":
            return switch(visitor, bool(sent(event).get("blind")))
        try:
            if action == "reveal":
                return [_closed("Names shown without a vote."), reveal(visitor)]
            choice = str(sent(event).get("choice"))
            kept = await visitor.vote(choice)
        except PageError as error:
            return [{**bar_value(visitor), "words": f"{error}"}, gr.skip()]
        return [_thanks(kept, choice, visitors.voted), revealed(kept.comparison.stage, kept.order or ())]

    async def follow(ended: dict | None, request: gr.Request) -> dict:
        return bar_value(visitors.of(request.session_hash), running=ended is None)

    finished.change(follow, finished, bar, queue=False, **QUIET)
    return bar.select(act, None, [bar, stage], queue=False, **QUIET)


def build_board(demo: gr.Blocks, store: VoteStore, examples: Sequence[Example]) -> None:
    """Add the Board page, with a ranking for each example.

    Must be called outside the `gr.Blocks` context, as Gradio requires.
    """

    def view() -> dict:
        try:
            found = store.read()
        except PageError as error:
            return {"phase": "error", "words": f"{error}"}
        count = counted(len(found.votes), "vote")
        skipped = f" {found.skipped} more could not be read." if found.skipped else ""
        words = f"{count} on blind comparisons.{skipped}"
        needed = (
            "How many votes are enough? To tell a preference of 60 to 40 from chance takes about "
            f"{votes_needed(0.6)} votes between the two models, one of 75 to 25 about {votes_needed(0.75)} "
            "(80% power at the 5% level). With fewer, read the intervals, not the order."
        )
        phase = "votes" if found.votes else "empty"
        return {"phase": phase, "words": words, "needed": needed, "groups": rankings(found.votes, examples)}

    with demo.route("Board", "/board", show_in_navbar=False):
        page = component("board", value={"phase": "loading"}, elem_id="ml-board")
        # Read when the page opens, so that a reload shows the current votes.
        demo.load(view, None, page, queue=False, **QUIET)
