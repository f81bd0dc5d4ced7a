"""`minilora combine` and `minilora experts`: make new adapters from trained ones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from minilora_hub.cli.convert import Out, Prompts
from minilora_hub.cli.options import (
    AsJson,
    Base,
    Debug,
    Revision,
    local_folder,
    print_json,
    print_notes,
    print_written,
    refuse_unused,
)
from minilora_hub.errors import AdapterError

Method = Literal[
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "svd",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
    "cat",
]

MixLora = Annotated[str, typer.Argument(metavar="REPO_OR_DIR", help="A MixLoRA: a folder or an id on the Hub.")]

experts = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Add experts to a MixLoRA, or drop some.")


def combine(
    context: typer.Context,
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER…", help="LoRA adapters: folders or ids.")],
    out: Out,
    method: Annotated[
        Method,
        typer.Option(
            help="cat: the exact sum, the ranks add up; svd: the sum, reduced to a rank; the others as in PEFT."
        ),
    ] = "svd",
    weight: Annotated[
        list[float] | None, typer.Option(help="A factor for each adapter, in order. Default: the mean.")
    ] = None,
    density: Annotated[float, typer.Option(help="Share of values that ties, dare and magnitude_prune keep.")] = 0.5,
    rank: Annotated[int | None, typer.Option(help="Rank of the result, for svd. Default: the largest.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of dare's random pruning.")] = 0,
    base: Base = None,
    revision: Revision = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Combine LoRA adapters on one base into a new one, with PEFT's own functions."""
    from minilora_hub.formats.combine import WITHOUT_PRUNING, Combination
    from minilora_hub.formats.combine import combine as combine_adapters

    unused = ("density", "seed") if method in WITHOUT_PRUNING else () if method.startswith("dare") else ("seed",)
    refuse_unused(context, unused, f"--method {method}")
    factors = tuple(weight) if weight else (1 / len(adapters),) * len(adapters)
    combination = Combination(method, factors, density, rank, seed)
    combination.check(len(adapters))
    folders = [local_folder(adapter, revision) for adapter in adapters]
    notes = combine_adapters(folders, out, combination, base=base)
    print_written(out, asdict(combination), notes, as_json)


@experts.command("add", epilog="Example: minilora experts add ./my-mixlora --clone 0 --clone 3 --out ./my-larger")
def add(
    context: typer.Context,
    adapter: MixLora,
    clone: Annotated[list[int], typer.Option(help="Index of an expert to clone. May be repeated.")],
    out: Out,
    noise: Annotated[float, typer.Option(help="Standard deviation of noise on a clone's router row.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    prompts: Prompts = None,
    base: Base = None,
    revision: Revision = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Add clones of experts, and print how much the output changes."""
    from minilora_hub.formats.experts import add_experts

    if not noise:
        refuse_unused(context, ("seed",), "clones without --noise")
    texts = _read_prompts(prompts)
    folder = local_folder(adapter, revision)
    _print_change(add_experts(folder, out, clone, base=base, prompts=texts, noise=noise, seed=seed), as_json)


@experts.command(
    "drop", epilog="Example: minilora experts drop ./my-mixlora --count 2 --prompts mine.txt --out ./small"
)
def drop(
    adapter: MixLora,
    count: Annotated[int, typer.Option(help="Experts to drop per layer: those that serve the fewest tokens.")],
    out: Out,
    prompts: Prompts = None,
    base: Base = None,
    revision: Revision = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Drop the least used experts of every layer, and print how much the output changes."""
    from minilora_hub.formats.experts import drop_experts

    texts = _read_prompts(prompts)
    folder = local_folder(adapter, revision)
    _print_change(drop_experts(folder, out, count, base=base, prompts=texts), as_json)


def _read_prompts(file: Path | None) -> list[str] | None:
    if file is None:
        return None
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"prompts={str(file)!r} cannot be read: {error}") from error
    if not lines:
        raise AdapterError(f"prompts={str(file)!r}: it contains no prompt")
    return lines


def _print_change(change: Any, as_json: bool) -> None:
    if as_json:
        print_json(asdict(change) | {"folder": str(change.folder)})
        return
    print_notes(change.notes)
    typer.echo(f"{change.folder}: {change.experts[0]} -> {change.experts[1]} experts per layer")
    typer.echo(
        f"on {change.tokens} tokens: KL divergence {change.kl:.2g} nats per token, largest logit difference "
        f"{change.max_logit_difference:.2g}, the same next token for {change.top_token_agreement:.1%}"
    )
