"""`minilora import` and `minilora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from minilora_hub.cli.options import AsJson, Base, Debug, Revision, print_json, say
from minilora_hub.formatting import size as size_text

Out = Annotated[Path, typer.Option(metavar="DIR", help="The folder to write: empty, or not there yet.")]
Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text file with a prompt on each line. Default: a few fixed ones.")
]


def import_(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC…", help="A folder or an id on the Hub; several LoRAs become one MixLoRA."),
    ],
    out: Out,
    base: Base = None,
    base_revision: Annotated[str | None, typer.Option(metavar="REV", help="Revision of the base on the Hub.")] = None,
    revision: Revision = None,
    attention: Annotated[
        Literal["same", "mean", "svd", "drop"],
        typer.Option(
            help="Several LoRAs: what becomes of theirs on attention. same: they must be equal; mean: their exact "
            "mean, the ranks add up; svd: that, cut back to a rank; drop: left out."
        ),
    ] = "same",
    experts_per_tok: Annotated[int, typer.Option(min=1, help="Several LoRAs: experts that serve each token.")] = 2,
    seed: Annotated[int, typer.Option(help="Several LoRAs: seed of the fresh router.")] = 0,
    reference_dora: Annotated[
        Literal["loaded", "trained"],
        typer.Option(
            help="A reference adapter with use_dora, whose magnitudes its file lacks. loaded: plain LoRA, which is "
            "what the mixlora package computes; trained: the base's row norms, as in training."
        ),
    ] = "loaded",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Bring in an adapter from the reference MixLoRA format or from PEFT, or several LoRAs as one MixLoRA."""
    from minilora_hub.formats.importing import import_adapter, import_as_experts

    folders = [local_folder(source, revision) for source in sources]
    if len(folders) == 1:
        made = import_adapter(folders[0], out, base=base, base_revision=base_revision, reference_dora=reference_dora)
    else:
        made = import_as_experts(
            folders,
            out,
            base=base,
            base_revision=base_revision,
            num_experts_per_tok=experts_per_tok,
            attention=attention,
            seed=seed,
        )
    for note in made.notes:
        say(f"Note: {note}")
    tell(made.folder, {"method": made.method, "from": made.source, "notes": list(made.notes)}, as_json)


def export(
    adapter: Annotated[str, typer.Argument(metavar="REPO_OR_DIR", help="An id on the Hub, or a folder.")],
    to: Annotated[
        Literal["peft", "dense", "mixtral", "moe", "mixlora"],
        typer.Option(
            help="peft: for PEFT; dense: merged into the base (LoRA, DoRA); mixtral: a MixLoRA as an ordinary Mixtral; "
            "moe: as the mixture of experts of the base's family; mixlora: the reference format."
        ),
    ],
    out: Out,
    base: Base = None,
    revision: Revision = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="dense, mixtral, moe: dtype of the checkpoint. auto: the base's own."),
    ] = "auto",
    dequantize: Annotated[bool, typer.Option("--dequantize", help="dense: a quantised base may be opened.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write an adapter in a format that other engines read."""
    from rich.console import Console
    from rich.progress import Progress

    from minilora_hub.formats.exporting import export_adapter

    folder = local_folder(adapter, revision)
    with Progress(console=Console(stderr=True), disable=as_json, transient=True) as bars:
        task = bars.add_task("Writing", total=None)

        def announce(plan: Any) -> None:
            if not as_json:
                memory = plan.bytes_of_model + plan.bytes_of_largest_shard
                say(
                    f"{plan.architecture.name}: {size_text(plan.bytes_on_disk)} in {plan.shards} files; about "
                    f"{size_text(memory)} of memory, {size_text(plan.bytes_of_model)} of it the base and the adapter"
                )

        made = export_adapter(
            folder,
            out,
            to,
            base=base,
            dtype=dtype,
            dequantize=dequantize,
            announce=announce,
            progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    for note in made.notes:
        say(f"Note: {note}")
    tell(made.folder, {"to": made.to, "notes": list(made.notes)}, as_json)


def local_folder(source: str, revision: str | None = None) -> Path:
    """Return the folder of an adapter; one on the Hub is fetched into the Hub's cache, and nothing of it is run."""
    from minilora_hub.hub.client import fetch

    if Path(source).is_dir() or source.startswith((".", "/", "~")):
        return Path(source).expanduser()
    return fetch(source, revision=revision, token=None, progress=True)[0]


def tell(folder: Path, facts: dict[str, Any], as_json: bool) -> None:
    """Print which folder was written, and its size."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if as_json:
        print_json({"folder": str(folder), "bytes": size} | facts)
    else:
        typer.echo(f"{folder} ({size_text(size)})")
