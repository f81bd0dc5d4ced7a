"""`minilora train` and `minilora sweep`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minilora_hub.cli.options import AsJson, Debug, given, print_json, print_notes, print_table, say
from minilora_hub.errors import TrainingError
from minilora_hub.formatting import counted

if TYPE_CHECKING:
    from minilora_hub.training.plan import Plan
    from minilora_hub.training.settings import TrainingSettings
    from minilora_hub.training.sweep_trials import Trial

METHODS = "lora, dora, mixlora, mixdora; through PEFT: rslora, pissa, loftq, adalora, fourierft, vera, peft."

Method = Annotated[str | None, typer.Option("--method", metavar="M", help=METHODS)]
TrainedBase = Annotated[str | None, typer.Option("--base", metavar="ID", help='"embedded", a folder or a Hub id.')]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="FILE", help=".jsonl, .csv, .parquet, .txt or .md; may be repeated. Or a data set."),
]
Config = Annotated[Path | None, typer.Option("--config", metavar="YAML", help="A file of settings; flags override it.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any other setting, e.g. num_experts=4. May be repeated."),
]


def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write: new or empty.")],
    method: Method = None,
    base: TrainedBase = None,
    data: Data = None,
    from_votes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Instead of --data: your own votes, stored by minilora demo --allow-training. Adds dpo.",
        ),
    ] = None,
    from_adapter: Annotated[
        str | None, typer.Option("--from", metavar="ADAPTER", help="Continue from an adapter: a folder or a Hub id.")
    ] = None,
    from_revision: Annotated[str | None, typer.Option(metavar="REV", help="Revision of that adapter.")] = None,
    learn: Annotated[
        str | None, typer.Option(metavar="PART", help="With --from: router, experts, attention or all of it.")
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,…]",
            help="A term added to the loss, may be repeated: distill:teacher=ADAPTER, orthogonal, anchor:data=TEXT, "
            "dpo.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="ADAPTER", help="A LoRA that stays active under the new one. May be repeated."),
    ] = None,
    config: Config = None,
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in DIR.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and train nothing.")] = False,
    rank: Annotated[
        str | None,
        typer.Option("--rank", "-r", metavar="R", help="Rank of the low-rank updates, or auto with --budget."),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(metavar="PARAMETERS", help="With --rank auto: EVA distributes them over the linears by the data."),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step, over all processes.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Rows per forward pass and process.")] = None,
    batching: Annotated[str | None, typer.Option(metavar="HOW", help="shuffled, length-grouped or packed.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens in a row. Default: the base's context.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Truncate longer rows.")] = False,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Skip invalid rows.")] = False,
    validation: Annotated[float | None, typer.Option(metavar="SHARE", help="Share of rows to hold out.")] = None,
    validation_data: Annotated[
        list[str] | None,
        typer.Option("--validation-data", metavar="FILE", help="Rows to validate on, instead of held-out rows."),
    ] = None,
    early_stopping: Annotated[
        int | None, typer.Option(metavar="N", help="Stop after N evaluations without improvement.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(metavar="N", help="Steps between checkpoints.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="transformers' name, e.g. paged_adamw_8bit.")] = None,
    loraplus_ratio: Annotated[
        float | None, typer.Option(help="LoRA+: learning rate of B divided by that of A.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(metavar="KIND", help="Quantise the base: nf4 or int8.")] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="START",
            help="calibrated or loftq: start by making up for the rounding of a base that minilora quantize wrote.",
        ),
    ] = None,
    exact_base: Annotated[
        str | None, typer.Option(metavar="ID", help="With --init: the base that a quantized one was made of.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initial weights, order and held-out rows.")] = None,
    report_to: Annotated[
        list[str] | None, typer.Option("--report-to", metavar="NAME", help="trackio, tensorboard or wandb.")
    ] = None,
    base_revision: Annotated[str | None, typer.Option(metavar="REV", help="Revision of a base on the Hub.")] = None,
    data_split: Annotated[str | None, typer.Option(metavar="SPLIT", help="Split of a data set on the Hub.")] = None,
    data_revision: Annotated[str | None, typer.Option(metavar="REV", help="Revision of a data set on the Hub.")] = None,
    license: Annotated[str | None, typer.Option(metavar="ID", help="The adapter's licence, for its card.")] = None,
    language: Annotated[
        list[str] | None, typer.Option(metavar="CODE", help="The adapter's language, for its card. May be repeated.")
    ] = None,
    about_data: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Description of the data, for the card.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="text-generation, image-text-to-text (chats with pictures), text-classification (text and label) or "
            "token-classification (tokens and tags). Default: by the first row's fields.",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train an adapter; the folder is ready for minilora push."""
    from minilora_hub.training.run import train as run

    result = run(
        out,
        config=config,
        resume=resume,
        dry_run=dry_run,
        progress=not as_json,
        on_plan=None if as_json else _print_plan,
        **_settings(context, set_),
    )
    if not result.main:
        return
    if as_json:
        print_json(asdict(result) | {"out": str(result.out)})
        return
    for line in result.skipped:
        say(f"skipped {line}")
    if result.skipped:
        say(f"{len(result.skipped)} row{'s' if len(result.skipped) > 1 else ''} skipped")
    print_notes(result.notes)
    if dry_run:
        typer.echo("Nothing was trained.")
        return
    validated = ""
    if result.validation_loss is not None:
        validated = f", validation loss {result.validation_loss:.4f} at step {result.best_step}, which was saved"
    typer.echo(f"{out}: {counted(result.steps, 'step')} in {result.seconds:.0f} s, loss {result.loss:.4f}{validated}")
    if result.pairs:
        typer.echo(result.pairs.described())
    typer.echo(f"next: minilora push {out} NAME --dry-run")


NOT_SETTINGS = ("out", "config", "set_", "resume", "dry_run", "as_json", "debug", "vary", "search", "trials", "minutes")


def _settings(context: typer.Context, assignments: list[str] | None) -> dict[str, Any]:
    """Return the settings that the user gave: the flags, each by its setting's name, and the values of --set.

    Raises:
        TrainingError: a setting is given twice.
    """
    from minilora_hub.training.settings import parse_assignment

    flags = {name: value for name, value in given(context).items() if name not in NOT_SETTINGS}
    settings = {"r" if name == "rank" else name: value for name, value in flags.items()}
    if "r" in settings and settings["r"] != "auto":
        try:
            settings["r"] = int(settings["r"])
        except ValueError:
            raise TrainingError(f"--rank {settings['r']!r}: must be a whole number, or auto") from None
    for text in assignments or []:
        name, value = parse_assignment(text)
        if name in settings:
            raise TrainingError(f"--set {text!r}: {name} is given twice: remove one")
        settings[name] = value
    return settings


def _print_plan(plan: Plan, settings: TrainingSettings) -> None:
    for name, value in [("method", f"{settings.method} on {settings.base}"), *plan.lines()]:
        say(f"{name:<10} {value}")


def _print_trial(number: int, trial: Trial) -> None:
    values = ", ".join(f"{name} {value}" for name, value in trial.values.items())
    ends = {"running": "", "failed": f": {trial.reason}", "finished": f": {trial.validation_loss or 0:.4f}"}
    say(f"trial {number}: {values}{ends[trial.state]}")


def sweep(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder: new, or with a sweep to continue.")],
    vary: Annotated[
        list[str],
        typer.Option(
            "--vary", metavar="NAME=VALUES", help="learning_rate=1e-4,1e-3 or, for tpe, 1e-5..1e-3. May be repeated."
        ),
    ],
    method: Method = None,
    base: TrainedBase = None,
    data: Data = None,
    config: Config = None,
    set_: Set = None,
    search: Annotated[str, typer.Option(metavar="HOW", help="grid, or optuna's tpe.")] = "grid",
    trials: Annotated[int | None, typer.Option(metavar="N", min=1, help="Maximum number of trials.")] = None,
    minutes: Annotated[float | None, typer.Option(metavar="M", help="Maximum training time in minutes.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train with varied settings, and find the best on validation. The same command continues a stopped sweep."""
    from minilora_hub.training.sweep import sweep as run
    from minilora_hub.training.sweep_report import TABLE_FILE
    from minilora_hub.training.sweep_trials import parse_varied

    result = run(
        out,
        parse_varied(vary),
        search=search,  # type: ignore[arg-type]  # checked there
        trials=trials,
        minutes=minutes,
        progress=not as_json,
        on_trial=None if as_json else _print_trial,
        config=config,
        **_settings(context, set_),
    )
    if not result.main:
        return
    failed = bool(result.trials) and not result.best
    if as_json:
        print_json(asdict(result) | {"out": str(out)})
        raise typer.Exit(int(failed))
    names = list(result.trials[0].values) if result.trials else []
    table = [[*names, "validation loss", "step", "seconds"]]
    for trial in result.trials:
        loss = f"{trial.validation_loss:.4f}" if trial.validation_loss is not None else trial.state
        step = "" if trial.step is None else str(trial.step)
        table.append([*(str(trial.values[name]) for name in names), loss, step, f"{trial.seconds:.0f}"])
    print_table(table)
    print_notes(result.notes)
    if result.left:
        say(f"{result.left} trials were not run")
    typer.echo(f"table and plot: {out / TABLE_FILE}, {out}")
    if result.best:
        typer.echo(f"best: {out / 'trials' / result.best.folder}")
    raise typer.Exit(int(failed))
