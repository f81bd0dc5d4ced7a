"""`minilora compare`: answer one prompt with a base and adapters, side by side in the terminal, live."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minilora_hub.cli.options import AsJson, Debug, Dtype, print_json, say
from minilora_hub.formatting import counted, require_encodable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from minilora_hub.compare.engine import Column, CompareEngine, Sampling, Update
    from minilora_hub.compare.prompt_index import Choice

NARROWEST = 28
"""Minimum width of a column in characters; on a narrower terminal the answers are printed one below the other."""


def compare(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER", help="Folders, or ids on the Hub. Default: the adapters shipped here."),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help='The prompt; "-" reads it from standard input.')] = "-",
    base: Annotated[
        str | None,
        typer.Option(
            help='"embedded", a folder or a Hub id. Default: the base the adapters name; with --route the index\'s.'
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token; above 0 samples.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the tokens that reach this probability together.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample among this many tokens; 0 for all.")] = 0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that occurred before are less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End an answer before this text. May be repeated.")] = None,
    route: Annotated[
        Path | None,
        typer.Option(
            metavar="INDEX", help="Answer with the adapter that this index chooses: see `minilora route build`."
        ),
    ] = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Answer one prompt with the base and with adapters on it, all in one batch, side by side."""
    if prompt == "-":
        if sys.stdin.isatty():
            say("Type the prompt, then Ctrl-D:")
        prompt = sys.stdin.read()

    from minilora_hub.compare.engine import CompareEngine, Sampling
    from minilora_hub.compare.found_adapters import base_for, shipped_adapters

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, tuple(stop or ()))
    if not prompt.strip():
        raise ValueError("--prompt '': must not be empty")
    require_encodable(prompt, "--prompt")
    if route is None:
        named = adapters or shipped_adapters()
        engine = CompareEngine(base_for(base, named, say), named, dtype=dtype, progress=say)
        choice = None
    else:
        engine, choice = _chosen(route, base, adapters, prompt, dtype)
    answers = [_Answer(column) for column in engine.columns]
    if as_json:
        _run(engine, prompt, sampling, answers)
        report = _report(engine, prompt, sampling, answers)
        print_json(report if choice is None else report | {"route": choice.to_dict()})
    else:
        _show(engine, prompt, sampling, answers)
    if any(answer.last is not None and answer.last.reason == "error" for answer in answers):
        raise typer.Exit(1)


def _chosen(
    file: Path, base: str | None, adapters: list[str] | None, prompt: str, dtype: str | None
) -> tuple[CompareEngine, Choice]:
    """Return an engine with the adapter that an index chooses for the prompt, and the choice."""
    from minilora_hub.bases.resolving import resolve_base
    from minilora_hub.compare.engine import CompareEngine
    from minilora_hub.compare.found_adapters import find_adapter
    from minilora_hub.compare.prompt_index import AdapterIndex, choose_in
    from minilora_hub.remote_code.adapter_files import base_fingerprint

    if adapters:
        raise ValueError("--route: the index names the adapters; leave them out")
    index = AdapterIndex.load(file)
    base = base or index.base
    index.require_base(base_fingerprint(str(resolve_base(base).path)))
    engine = CompareEngine(base, dtype=dtype, progress=say)
    choice = choose_in(engine, index, prompt)
    column = engine.load(choice.adapter, find_adapter(choice.source).folder)
    engine.columns = (*engine.columns, column)
    say(choice.described())
    return engine, choice


@dataclass
class _Answer:
    """The answer of one column so far."""

    column: Column
    text: str = ""
    updates: list[Update] = field(default_factory=list)

    @property
    def last(self) -> Update | None:
        return self.updates[-1] if self.updates else None


def _run(
    engine: CompareEngine,
    prompt: str,
    sampling: Sampling,
    answers: list[_Answer],
    after: Callable[[], None] = lambda: None,
) -> None:
    for update in engine.stream(prompt, sampling):
        answers[update.row].text += update.text
        answers[update.row].updates.append(update)
        after()


def _show(engine: CompareEngine, prompt: str, sampling: Sampling, answers: list[_Answer]) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if console.is_terminal:
        # During the run the output is cropped to the terminal; at the end all of it is printed.
        with Live(console=console, refresh_per_second=12, transient=True) as live:
            _run(engine, prompt, sampling, answers, lambda: live.update(_picture(console.width, answers)))
    else:
        _run(engine, prompt, sampling, answers)
    console.print(_picture(console.width, answers))


def _picture(width: int, answers: list[_Answer]) -> RenderableType:
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    colours = {"base": "white", "LoRA": "green", "DoRA": "blue", "MixLoRA": "magenta", "MixDoRA": "cyan"}
    panels = []
    for answer in answers:
        # As Text, so that rich does not interpret a model's output as markup.
        body = Text(_printable(answer.text))
        if answer.last is not None and answer.last.error:
            body.append(f"\n{_printable(answer.last.error)}", style="red")
        title = Text.assemble((answer.column.name, "bold"), f"  {answer.column.kind}")
        panels.append(
            Panel(
                body,
                title=title,
                subtitle=Text(_figures(answer)),
                border_style=colours[answer.column.kind],
                padding=(0, 1),
            )
        )
    if width < NARROWEST * len(panels):
        return Group(*panels)
    grid = Table.grid(expand=True, padding=0)
    for _ in panels:
        grid.add_column(ratio=1)
    grid.add_row(*panels)
    return grid


def _figures(answer: _Answer) -> str:
    last = answer.last
    if last is None:
        return "…"
    parts = [counted(last.tokens, "token")]
    if last.tokens_per_second is not None:
        parts.append(f"{last.tokens_per_second:.1f}/s")
    if last.finished:
        parts.append({"eos": "finished", "length": "length limit", "stop": "stop text"}.get(str(last.reason), "failed"))
    return " · ".join(parts)


def _printable(text: str) -> str:
    """Remove control characters, which could move the cursor or change the terminal's state.

    Spaces of every kind and the joiners inside an emoji or a word are kept.
    """
    return "".join(c for c in text if c in "\n\t\u200c\u200d" or unicodedata.category(c) == "Zs" or c.isprintable())


def _report(engine: CompareEngine, prompt: str, sampling: Sampling, answers: list[_Answer]) -> dict[str, Any]:
    """Return all results as JSON data."""
    columns = [_column(engine, prompt, answer) for answer in answers]
    return {"prompt": prompt, "sampling": asdict(sampling), "forwards": engine.forwards, "columns": columns}


def _column(engine: CompareEngine, prompt: str, answer: _Answer) -> dict[str, Any]:
    column, last = answer.column, answer.last
    prompting = engine.prompting(column.adapter)
    tokens = [
        {
            "id": update.token_id,
            "text": engine.token_text(update.token_id, column.adapter),
            "logprob": update.logprob,
            "alternatives": [{"id": token, "logprob": share} for token, share in update.alternatives],
            **({} if update.experts is None else {"experts": update.experts}),
            **({} if update.expert_weights is None else {"expert_weights": update.expert_weights}),
        }
        for update in answer.updates
        if update.token_id is not None
    ]
    return {
        "name": column.name,
        "kind": column.kind,
        "parameters_added": column.parameters_added,
        "prompt_text": prompting.tokenizer.decode(engine.prompt_ids(prompt, column.adapter)),
        "ends": prompting.end_names,
        "text": answer.text,
        "reason": last and last.reason,
        "error": last and last.error,
        "tokens": tokens,
        "seconds_to_first_token": last and last.seconds_to_first_token,
        "tokens_per_second": last and last.tokens_per_second,
    }
