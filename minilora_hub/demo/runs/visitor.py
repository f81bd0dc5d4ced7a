"""State of each visitor: the shown columns, the running comparison and the history. No Gradio.

The state is only in memory, and is deleted when the page is closed. Votes and share links refer to comparisons in the
server's history, never to content that a browser sends. All calls come from the server's event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import count
from typing import Any

from minilora_hub.compare.answer import Turns
from minilora_hub.compare.engine import Sampling
from minilora_hub.demo.runs.auto_column import COLUMN
from minilora_hub.demo.runs.comparison import Comparison
from minilora_hub.demo.runs.conversation import Conversation, turns_before
from minilora_hub.demo.runs.examples import Example, expected_answers
from minilora_hub.demo.runs.history import History, KeptComparison
from minilora_hub.demo.runs.own_sampling import OwnSampling, differing, settings_of
from minilora_hub.demo.runs.runner import Runner, waiting_words
from minilora_hub.demo.runs.shown_columns import ShownColumns
from minilora_hub.demo.ui.page_state import Frame, RunningComparison, answering, without_html
from minilora_hub.demo.votes.blind import Blindfold, shuffled
from minilora_hub.demo.votes.sharing import SharedComparisons
from minilora_hub.demo.votes.voted_answers import VotedAnswersFile
from minilora_hub.demo.votes.votes import ALL_BAD, TIE, VoteStore, vote_on
from minilora_hub.documents import Scalar
from minilora_hub.errors import AdapterError, PageError

MOST_VISITORS = 1000


class Visitor(ShownColumns):
    """One open page.

    Args:
        visitors: the state that all visitors share.

    Attributes:
        blind: whether the next comparison is blind.
        history: the visitor's comparisons.
        sampling: the settings of single columns.
    """

    def __init__(self, visitors: Visitors) -> None:
        super().__init__(visitors.runner)
        self._visitors = visitors
        self.blind = False
        self.history = History()
        self._number, self._stop = 0, threading.Event()
        self.conversation, self.sampling = Conversation(), OwnSampling()
        self._next_only: int | None = None  # the column that the next run answers again
        self._only: int | None = None
        self._halted: set[int] = set()  # rows of the running comparison that are stopped

    async def choose(self, names: Sequence[str]) -> None:
        """Show these adapters, as `ShownColumns.choose` does, and end the comparison and the conversation."""
        await super().choose(names)
        self.stop()
        self.conversation.clear()

    def ask_again(self, index: int) -> Comparison:
        """Let the next run answer only one column of the shown comparison again, and return that comparison.

        Raises:
            PageError: no comparison of the shown columns has ended, the next one is blind, or there is no such column.
        """
        if self.hides:
            raise PageError("in blind mode all answers are new: switch it off to repeat one")
        comparison = self.history.shown().comparison
        if [column["about"] for column in comparison.columns] != self.about():
            raise PageError("this comparison is of other columns: run it again")
        if not 0 <= index < len(comparison.columns):
            raise PageError(f"column {index}: must be from 0 to {len(comparison.columns) - 1}")
        self._next_only = index
        return comparison

    # ---- running ----

    @property
    def hides(self) -> bool:
        """Whether names are hidden: in blind mode, unless experts answer alone, since the visitor chose them."""
        return self.blind and self._solo is None

    def own(self) -> list[dict[str, Scalar]]:
        """Return the own settings of each shown column. In blind mode there are none: votes compare models alone."""
        about = self.about()
        return [{} for _ in about] if self.hides else self.sampling.of(about)

    @property
    def stores_texts(self) -> bool:
        """Whether prompts and answers that are voted on are stored for training."""
        return self._visitors.voted is not None

    @property
    def samples(self) -> bool:
        """Whether a column draws its tokens whatever the common settings are."""
        return any(own.get("temperature") for own in self.own())

    def tune(self, index: int, own: Any, again: bool) -> Comparison | None:
        """Give a column settings of its own, or with none the common ones again.

        Args:
            index: the column.
            own: the settings.
            again: let the next run answer this column of the shown comparison again, see `ask_again`.

        Returns:
            That comparison, if it is to be answered again.

        Raises:
            PageError: a setting is wrong, there is no such column, or it cannot be answered again.
        """
        about = self.about()
        if not 0 <= index < len(about):
            raise PageError(f"column {index}: must be from 0 to {len(about) - 1}")
        comparison = self.ask_again(index) if again else None
        try:
            self.sampling.set(about[index], own)
        except PageError:
            self._next_only = None
            raise
        return comparison

    def begin(self, prompt: str = "") -> Frame:
        """Stop a running comparison, prepare the next one, and return its first frame."""
        self.stop()
        self._only, self._next_only = self._next_only, None
        if self._only is None:
            self._solo, self._next_solo = self._next_solo, None
        self._halted = set()
        self._number, self._stop = next(self._visitors.numbers), threading.Event()
        words = "Waiting in the queue…" if self._runner.queue.full else "Reading the prompt…"
        expected = self._visitors.expected.get(prompt.strip())
        running = RunningComparison(self._number, self.about(), prompt, expected=expected, own=self.own())
        if self._only is not None:
            running.only(self._only, self.history.shown().comparison.columns)
        frame = running.waiting(words)
        return Blindfold(range(len(frame.stage["columns"]))).frame(frame) if self.hides else frame

    def stop(self) -> None:
        """End the running or waiting comparison, if any, within one step."""
        self._stop.set()

    def halt(self, index: int) -> None:
        """End the answer of one column of the running comparison within one step."""
        if not self.hides:
            self._halted.add(index if self._only is None else 0)

    async def run(
        self, prompt: str, sampling: Sampling, system: str = "", before: Sequence[Turns] | None = None
    ) -> AsyncGenerator[Frame]:
        """Run the comparison that `begin` prepared. Closing or cancelling the iterator ends it within one step.

        It also ends, without a last frame, when the visitor chooses other adapters, whose columns are then shown.

        Args:
            prompt: the prompt.
            sampling: the settings.
            system: the system prompt, empty for the chat template's own.
            before: the earlier turns of each column; default: none.
        """
        number, stop, chosen, only = self._number, self._stop, self._adapters, self._only
        about, expected = self.about(), self._visitors.expected.get(prompt.strip())
        shown = self.history.shown().comparison.columns if only is not None else []
        turns = [turns_before(column) for column in shown] or list(before or [()] * len(about))
        own = self.own()
        token_text = self._runner.engine.token_text
        running = RunningComparison(number, about, prompt, sampling, token_text, expected, turns, own)
        asked = slice(None)
        if only is not None:
            was, now = self.history.shown().comparison.sampling, settings_of(sampling, system)
            kept = [column | {"sampling": differing(now, was | (column.get("sampling") or {}))} for column in shown]
            running.only(only, kept)
            asked = slice(only, only + 1)
        told = (("system", system.strip()),) if system.strip() else ()
        messages = [(*told, *one) for one in turns[asked]]
        try:
            columns = self.columns()
            moments = self._runner.answer(
                prompt, sampling, columns[asked], stop, messages, self._halted, own[asked], among=columns
            )
        except (ValueError, AdapterError) as error:
            yield running.refused(f"{error}")
            return
        async with aclosing(moments):
            async for moment in moments:
                if self._adapters is not chosen:
                    return
                if moment.waiting is not None:
                    yield running.waiting(waiting_words(moment.waiting))
                    continue
                if moment.choice:
                    running.routed(COLUMN.name, moment.choice.to_dict())
                for update in moment.updates:
                    running.add(update)
                running.forwards += moment.forwards
                yield running.frame(finished=moment.finished, stopped=stop.is_set())

    async def run_and_keep(self, prompt: str, sampling: Sampling, system: str = "") -> AsyncGenerator[Frame]:
        """Run like `run`, and add the comparison to the history; frames of a blind comparison do not reveal names.

        It continues the conversation as `conversation` says; a blind one begins anew, since earlier answers have names.
        """
        catalogue, about = self._runner.catalogue, self.about()
        # Drawn here and not in `begin`, so that a run that `begin` stopped does not share the order.
        blindfold = Blindfold(shuffled(len(about))) if self.hides else None
        hashing = asyncio.create_task(asyncio.to_thread(catalogue.weights, [one["adapter"] for one in about[1:]]))
        before = None if self.hides else self.conversation.before(about)
        async with aclosing(self.run(prompt, sampling, system, before)) as frames:
            async for frame in frames:
                if frame.finished and frame.stage["columns"][0]["state"] != "idle":
                    hashed, stage = await hashing, without_html(frame.stage)
                    of = {one["adapter"]: weights for one, weights in zip(about, hashed, strict=True)}
                    weights = tuple(of[answering(column)] for column in stage["columns"])
                    fields = settings_of(sampling, system)
                    comparison = Comparison(prompt, fields, catalogue.base, stage, frame.status, weights)
                    if not self.hides:  # blind mode was switched off during the run
                        blindfold = None
                    kept = self.history.add(comparison, blindfold.order if blindfold else None)
                    self.conversation.keep(frame.stage)
                    self._visitors.make_room(self)
                    if kept.closed:
                        blindfold = None
                yield blindfold.frame(frame) if blindfold else frame

    # ---- what was run ----

    def show(self, kept: KeptComparison) -> None:
        """Set the shown comparison: one from the history or from a share link."""
        self.history.show(kept)
        self.conversation.keep(kept.comparison.stage)
        self.sampling.adopt(kept.comparison.stage)
        self._visitors.make_room(self)

    def repeat(self) -> Comparison:
        """Go back to before the comparison that was run last, with its columns' own settings, and return it.

        Raises:
            PageError: there is none.
        """
        comparison = self.history.last().comparison
        self.conversation.rewind(comparison.stage)
        self.sampling.adopt(comparison.stage)
        return comparison

    async def vote(self, choice: str) -> KeptComparison:
        """Store a vote on the last comparison: the number of a letter from 0 on, `TIE` or `ALL_BAD`.

        Raises:
            PageError: it cannot be voted on (again), or the vote cannot be stored.
        """
        kept = self.history.close_last("you have voted on this comparison")
        order = kept.order or ()
        try:
            if choice in (TIE, ALL_BAD):
                chosen: int | str = choice
            elif choice in map(str, range(len(order))):
                chosen = order[int(choice)]
            else:
                raise PageError(f"choice={choice[:20]!r}: there is no such answer")
            await asyncio.to_thread(self._visitors.votes.add, vote_on(kept.comparison, kept.id, order, chosen))
            if self._visitors.voted:
                await asyncio.to_thread(self._visitors.voted.add, kept.comparison, kept.id, chosen)
        except Exception:
            kept.closed = None  # the visitor may try again; a vote that is stored twice counts once
            raise
        return kept

    async def share(self) -> str:
        """Store the shown comparison, unless it is stored already, and return its id.

        Raises:
            PageError: there is none, its names are still hidden, or it cannot be stored.
        """
        kept = self.history.shown()
        if kept.shared is None:
            kept.shared = await asyncio.to_thread(self._visitors.shared.add, kept.comparison)
        return kept.shared


class Visitors:
    """All visitors, and their shared state.

    Args:
        runner: runs the comparisons.
        votes: stores votes.
        shared: stores shared comparisons.
        examples: prompts of which the right answer may be known.
        voted: stores the texts that are voted on, where the page's owner allowed it.

    Attributes:
        numbers: counter that numbers the runs.
        expected: {prompt: right answer}.
    """

    def __init__(
        self,
        runner: Runner,
        votes: VoteStore,
        shared: SharedComparisons,
        examples: Sequence[Example] = (),
        voted: VotedAnswersFile | None = None,
    ) -> None:
        self.runner, self.votes, self.shared, self.examples = runner, votes, shared, tuple(examples)
        self.voted = voted
        self.expected = expected_answers(self.examples)
        self.numbers = count(1)
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()  # least recently active first

    def of(self, session: str | None) -> Visitor:
        """Return the visitor of a session. Beyond `MOST_VISITORS`, remove the least recently active one."""
        visitor = self._visitors.setdefault(session or "", Visitor(self))
        self._visitors.move_to_end(session or "")
        while len(self._visitors) > MOST_VISITORS:
            self._visitors.popitem(last=False)
        return visitor

    def leave(self, session: str | None) -> None:
        """Stop and remove a visitor who closed the page."""
        if visitor := self._visitors.pop(session or "", None):
            visitor.stop()

    @property
    def memory(self) -> int:
        """Bytes of memory that the histories of all visitors take."""
        return sum(visitor.history.memory for visitor in self._visitors.values())

    def make_room(self, current: Visitor) -> None:
        """Bound the memory of this visitor's history, then of all, least recently active visitors first."""
        limit = self.runner.limits.kept_megabytes * 10**6
        current.history.make_room(limit / 10)
        for visitor in self._visitors.values():
            if self.memory <= limit:
                return
            if visitor is not current:
                visitor.history.clear()
