"""The page's only public API endpoint, ``/compare``, which is also its MCP tool.

API requests wait in the same queue as the page's visitors. All other events of the page are private. No annotation here
is a string, because Gradio reads them to describe the endpoint.
"""

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr

from minilora_hub.compare.engine import Column, Sampling, Update
from minilora_hub.demo.runs.auto_column import COLUMN
from minilora_hub.demo.runs.own_sampling import settings_of, with_own
from minilora_hub.demo.runs.rates import CommonRates
from minilora_hub.demo.runs.runner import Moment, Runner, waiting_words
from minilora_hub.errors import MiniLoraError

NAME = "compare"


def add_api(runner: Runner) -> None:
    """Add the endpoint, inside the open page."""

    async def compare(
        prompt: str,
        request: gr.Request,
        adapters: list[str] | None = None,
        max_new_tokens: int = 96,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        experts: bool = False,
        column_sampling: dict[str, dict[str, float]] | None = None,
    ) -> AsyncIterator[dict[str, Any] | str]:
        """Answer one prompt with a base language model and with LoRA, DoRA or MixLoRA adapters on it, side by side.

        Use it to see what an adapter changes: all answers come from one batched pass, with the same sampling settings
        unless a column is given its own.

        Args:
            prompt: What to answer: a user's message, sent through the base's chat template.
            request: The HTTP request.
            adapters: Names of the page's own adapters, or ids on the Hub (owner/name). Default: all of the page's own.
                "auto", on a page with an index, is the one of the page's own that suits the prompt, whichever others
                are named.
            max_new_tokens: The most tokens of one answer.
            temperature: 0 takes the most probable token each time; above 0 samples.
            top_p: When sampling, keep the most probable tokens that together reach this probability.
            top_k: When sampling, keep this many of the most probable tokens; 0 keeps all.
            repetition_penalty: Above 1, words that were already used become less likely.
            seed: Seed of the sampling; the same seed and settings give the same answers.
            experts: Whether the last item also lists, for each token of a MixLoRA, the experts of every layer.
            column_sampling: Settings of single columns in place of the common ones, by the name of the row:
                temperature, top_p, top_k, repetition_penalty and seed.

        Returns:
            state (waiting, running or done), forwards of the base, seconds
            rows with name, kind, sampling, text, tokens, seconds_to_first_token, tokens_per_second, end, error and
                route: which adapter answers as "auto" and why, by its similarity and that of the runner_up
        """
        try:
            columns = await _columns(runner, adapters)
            if not isinstance(prompt, str):
                raise ValueError(f"prompt={prompt!r:.60}: must be a string")
            sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
            own = _own_sampling(columns, column_sampling)
            moments = runner.answer(prompt, sampling, columns, own=own, among=runner.engine.columns)
        except (ValueError, MiniLoraError) as error:
            raise gr.Error(f"{error}", print_exception=False) from None
        report = Report(columns, [settings_of(with_own(sampling, one)) for one in own], experts)
        # An MCP client receives str() of a result, so return JSON text instead of a dictionary.
        progress = gr.Progress()  # not a parameter, which would become a parameter of the endpoint
        as_text = request.headers.get("x-gradio-user") == "mcp"
        try:
            async for moment in moments:
                item = report.add(moment)
                longest = max(row["tokens"] for row in item["rows"])
                words = waiting_words(moment.waiting) if moment.waiting else None
                progress((longest, sampling.max_new_tokens), desc=words, unit="tokens")
                yield json.dumps(item, ensure_ascii=False) if as_text else item
        finally:
            await moments.aclose()

    compare.__annotations__["return"] = dict  # of each item; Gradio does not look inside an iterator
    gr.api(compare, api_name=NAME, concurrency_id="compute", concurrency_limit=None)


async def _columns(runner: Runner, adapters: list[str] | None) -> Sequence[Column]:
    """Return the columns of the base and of these adapters.

    Raises:
        ValueError: a name is not known; the message lists the known ones.
        AdapterError: an id on the Hub cannot be shown here.
    """
    base, *own = runner.engine.columns
    if adapters is None:
        return [base, *own]
    if not isinstance(adapters, list) or not all(isinstance(name, str) for name in adapters):
        raise ValueError(f"adapters={adapters!r:.60}: must be a list of names")
    if len(adapters) >= runner.limits.rows:  # before any of them is downloaded
        raise ValueError(
            f"{len(adapters)} adapters: this page gives 1 to {runner.limits.rows} answers, the base's included"
        )
    known = {column.name: column for column in (*own, *((COLUMN,) if runner.auto else ()))}
    columns = [base]
    for name in adapters:
        if name in known:
            columns.append(known[name])
        elif "/" in name:
            columns.append(await runner.fetch(name))
        else:
            raise ValueError(f"adapter {name[:60]!r}: must be an id on the Hub or one of {', '.join(known) or 'none'}")
    return columns


def _own_sampling(columns: Sequence[Column], given: Any) -> list[dict[str, Any]]:
    """Return the own settings of each column.

    Raises:
        ValueError: the argument has another form, or names no column; the message lists them.
    """
    names = [column.name for column in columns]
    given = {} if given is None else given
    if not isinstance(given, dict) or not all(isinstance(own, dict) for own in given.values()):
        raise ValueError(f"column_sampling={given!r:.60}: must be settings by the name of a row")
    for name in given:
        if name not in names:
            raise ValueError(f"column_sampling: {str(name)[:60]!r}: must be one of {', '.join(names)}")
    return [given.get(name, {}) for name in names]


class Report:
    """Builds the items that the endpoint yields; each holds the whole comparison so far.

    Args:
        columns: of the comparison.
        sampling: the settings of each.
        experts: whether the last item lists the experts of each token.
    """

    def __init__(self, columns: Sequence[Column], sampling: Sequence[dict[str, Any]], experts: bool) -> None:
        self._began, self._forwards, self._rates = time.perf_counter(), 0, CommonRates()
        self._experts: list[list[tuple]] | None = [[] for _ in columns] if experts else None
        self._rows: list[dict[str, Any]] = [
            {
                "name": column.name,
                "kind": column.kind,
                "sampling": settings,
                "text": "",
                "tokens": 0,
                "seconds_to_first_token": None,
                "tokens_per_second": None,
                "end": None,
                "error": None,
                "route": None,
            }
            for column, settings in zip(columns, sampling, strict=True)
        ]

    def add(self, moment: Moment) -> dict[str, Any]:
        """Add a progress event, and return the next item."""
        self._forwards += moment.forwards
        if moment.choice:
            for row in self._rows:
                if row["kind"] == COLUMN.kind:
                    row["route"] = moment.choice.to_dict()
        for update in moment.updates:
            self._add(update)
        waiting = moment.waiting
        item: dict[str, Any] = {
            "state": "waiting" if waiting else "done" if moment.finished else "running",
            "position": waiting.position if waiting else None,
            "seconds_until_start": round(waiting.seconds, 1) if waiting and waiting.seconds is not None else None,
            "forwards": self._forwards,
            "seconds": round(time.perf_counter() - self._began, 3),
            "rows": [dict(row) for row in self._rows],
        }
        if moment.finished and self._experts is not None:
            for row, tokens in zip(item["rows"], self._experts, strict=True):
                row["experts"] = tokens
        return item

    def _add(self, update: Update) -> None:
        row = self._rows[update.row]
        row["text"] += update.text
        row["tokens"] = update.tokens
        row["seconds_to_first_token"] = update.seconds_to_first_token
        row["tokens_per_second"] = self._rates.add(update)
        row["end"], row["error"] = update.reason, update.error
        if self._experts is not None and update.experts is not None:
            self._experts[update.row].append(update.experts)
