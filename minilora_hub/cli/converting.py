"""`minilora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from minilora_hub.cli.shared import Base, Debug, say, size_text


def export(
    adapter: Annotated[str, typer.Argument(metavar="REPO_OR_DIR", help="An id on the Hub, or a folder.")],
    to: Annotated[Literal["mixtral"], typer.Option(help="mixtral: a MixLoRA as an ordinary Mixtral checkpoint.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write: empty, or not there yet.")],
    base: Base = None,
    debug: Debug = False,
) -> None:
    """Write an adapter in a format that other engines read."""
    import torch
    from transformers import AutoTokenizer

    from minilora_hub import MixLoraForCausalLM
    from minilora_hub.compare.columns import adapter_type, find_adapter
    from minilora_hub.errors import AdapterError
    from minilora_hub.formats.mixtral import export_mixtral

    folder = find_adapter(adapter).folder
    kind = adapter_type(folder)
    if kind != "mixlora":
        raise AdapterError(f"adapter {adapter!r} is of type {kind!r}: only a MixLoRA can become a Mixtral")
    say("Loading the adapter and its base ...")
    model = MixLoraForCausalLM.from_pretrained(folder, base_model=base, dtype=torch.float32)
    say("Writing out the experts ...")
    export_mixtral(model, out, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    typer.echo(f"{out} ({size_text(sum(path.stat().st_size for path in out.iterdir()))})")
