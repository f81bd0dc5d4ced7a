"""`minilora quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minilora_hub.cli.options import Debug, say


def quantize(
    base: Annotated[str, typer.Argument(metavar="BASE", help='"embedded", a folder or a Hub id.')],
    to: Annotated[str, typer.Option("--to", metavar="KIND", help="nf4, or int4, int3, int2 by torchao.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write: new or empty.")],
    group_size: Annotated[
        int | None, typer.Option(metavar="N", help="int4, int3, int2: weights that share a scale. Default: 64.")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Revision of a base on the Hub.")] = None,
    debug: Debug = False,
) -> None:
    """Write a base with its linears quantized, to train on with minilora train --base DIR --init calibrated."""
    from minilora_hub.bases.quantizing import quantize_base

    quantize_base(base, to, out, group_size=group_size, revision=revision, progress=say)
    typer.echo(str(out))
    typer.echo(f"next: minilora train --base {out} --init calibrated --method lora --data FILE --out DIR")
