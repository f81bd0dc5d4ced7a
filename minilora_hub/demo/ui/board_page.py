"""The Board: what the votes add up to, on a page of its own."""

from __future__ import annotations

import gradio as gr

from minilora_hub.demo.runs.visits import Visits
from minilora_hub.demo.ui.components import QUIET, component
from minilora_hub.demo.votes.ranking import Board, Pair, Rate, Standing, board
from minilora_hub.errors import PageError


def build_board(demo: gr.Blocks, visits: Visits) -> None:
    """Add the page; call it outside of the `gr.Blocks` context, as Gradio wants."""
    with demo.route("Board", "/board", show_in_navbar=False):
        page = component("board", value={"phase": "loading"}, elem_id="ml-board")
        # As a function of the page's opening: whoever reloads sees the votes of the moment.
        demo.load(lambda: view(visits), None, page, queue=False, **QUIET)


def view(visits: Visits) -> dict:
    """Return what the page shows."""
    try:
        votes = visits.votes.read()
    except PageError as error:
        return {"phase": "error", "words": f"{error}"}
    result = board(votes.votes)
    return {
        "phase": "votes" if result.votes else "empty",
        "words": _words(result, votes.skipped),
        "rows": [_row(standing) for standing in result.standings],
        "pairs": [_pair(pair) for pair in result.pairs],
    }


def _words(result: Board, skipped: int) -> str:
    amount = "1 vote" if result.votes == 1 else f"{result.votes} votes"
    torn = f" {skipped} more could not be read." if skipped else ""
    return f"{amount} on blind comparisons.{torn}"


def _row(standing: Standing) -> dict:
    return {
        "name": standing.model.name,
        "kind": standing.model.kind,
        "weights": _short(standing.model.weights),
        "shown": standing.shown,
        "wins": standing.wins,
        "losses": standing.losses,
        "ties": standing.ties,
        "bad": standing.all_bad,
        "rate": _rate(standing.share),
        "chance": standing.chance,
    }


def _pair(pair: Pair) -> dict:
    return {
        "first": pair.first.name,
        "second": pair.second.name,
        "kinds": [pair.first.kind, pair.second.kind],
        "rate": _rate(pair.rate),
    }


def _rate(rate: Rate | None) -> dict | None:
    if rate is None:
        return None
    return {"value": rate.value, "low": rate.low, "high": rate.high, "wins": rate.wins, "n": rate.n}


def _short(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:8]
