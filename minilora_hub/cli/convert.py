"""`minilora import` and `minilora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from minilora_hub.cli.options import (
    Adapter,
    AsJson,
    Base,
    Debug,
    Revision,
    local_folder,
    print_written,
    refuse_unused,
    say,
)
from minilora_hub.formatting import size

Out = Annotated[Path, typer.Option(metavar="DIR", help="The folder to write: new or empty.")]
Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text file with a prompt on each line. Default: a few fixed ones.")
]


OF_SEVERAL = ("attention", "route", "experts_per_tok", "router", "temperature", "seed")
"""Options of an import of several LoRAs."""


def import_(
    context: typer.Context,
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
            help="Several LoRAs: how to combine their updates of attention. same: they must be equal; mean: their "
            "exact mean, the ranks add up; svd: the mean, reduced to a rank; drop: left out."
        ),
    ] = "same",
    route: Annotated[
        Literal["blocks", "all-linears"],
        typer.Option(
            help="Several LoRAs: what gets a router over them. blocks: each feed-forward block; all-linears: each "
            "linear that one of them updates, those of attention too."
        ),
    ] = "blocks",
    experts_per_tok: Annotated[int, typer.Option(min=1, help="Several LoRAs: experts that serve each token.")] = 2,
    router: Annotated[
        Literal["fresh", "arrow"],
        typer.Option(
            help="Several LoRAs. fresh: a router to be trained; arrow: one that compares a token with the direction "
            "that each LoRA changes most, and needs no training."
        ),
    ] = "fresh",
    temperature: Annotated[float, typer.Option(help="arrow: by which the similarities are divided.")] = 1.0,
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
    """Import an adapter from the reference MixLoRA format or from PEFT, or several LoRAs as one MixLoRA."""
    from minilora_hub.formats.importing import import_adapter, import_as_experts

    several = len(sources) > 1
    unused = ("reference_dora", "seed" if router == "arrow" else "temperature") if several else OF_SEVERAL
    refuse_unused(context, unused, f"several LoRAs with a router that is {router}" if several else "one adapter")
    folders = [local_folder(source, revision) for source in sources]
    if not several:
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
            router=router,
            temperature=temperature,
            route=route,
        )
    print_written(made.folder, {"method": made.method, "from": made.source}, made.notes, as_json)


def export(
    context: typer.Context,
    adapter: Adapter,
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
    dequantize: Annotated[bool, typer.Option("--dequantize", help="dense: dequantise a quantised base.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write an adapter in a format that other engines read."""
    from rich.console import Console
    from rich.progress import Progress

    from minilora_hub.formats.exporting import export_adapter

    if to != "dense":
        unused = ("dequantize",) if to in ("mixtral", "moe") else ("dtype", "dequantize")
        refuse_unused(context, unused, f"--to {to}")
    folder = local_folder(adapter, revision)
    with Progress(console=Console(stderr=True), disable=as_json, transient=True) as bars:
        task = bars.add_task("Writing", total=None)

        def announce(plan: Any) -> None:
            if not as_json:
                memory = plan.bytes_of_model + plan.bytes_of_largest_shard
                say(
                    f"{plan.architecture.name}: {size(plan.bytes_on_disk)} in {plan.shards} files; about "
                    f"{size(memory)} of memory, including {size(plan.bytes_of_model)} for base and adapter"
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
    print_written(made.folder, {"to": made.to}, made.notes, as_json)
