"""Write the output of a run: adapter, tokenizer, settings, loss curve and results.json."""

from __future__ import annotations

import csv
import io
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.folders import count_values
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.adapter_folder.results import Base, DataSource, Results, Training
from minilora_hub.bases.end_tokens import end_token_ids
from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.documents import write_whole
from minilora_hub.training.dataset import TrainingData
from minilora_hub.training.models import Trainee
from minilora_hub.training.objective_specs import parse_objectives
from minilora_hub.training.preference import HeldOutPairs
from minilora_hub.training.recipes import OURS
from minilora_hub.training.settings import TrainingSettings
from minilora_hub.training.sources import is_file

LOSS_FILE = "loss.csv"
POINTS = 200
"""Maximum number of points of the loss curve in results.json; loss.csv has all of them."""

METHODS = {"mixdora": "mixlora", "mixlora": "mixlora", "dora": "dora", "lora": "lora", "adalora": "lora"}
LIBRARIES = ("torch", "transformers", "peft", "minilora_hub")
EMBEDDED_NOTE = (
    'trained on a Q4_1 rounding of these weights, expanded to float32 (what minilora_hub calls the base "embedded")'
)
VOTES_NOTE = "A person's choices between answers on a page; neither the prompts nor the answers are published."
QUANTIZED_NOTE = "trained on this base loaded in {kind} by bitsandbytes: load it in the same way"


def write_result(
    out: Path,
    settings: TrainingSettings,
    resolved: ResolvedBase,
    trainee: Trainee,
    data: TrainingData,
    tokenizer: Any,
    ends: list[int],
    history: list[dict[str, float]],
    seconds: float,
    pairs: HeldOutPairs | None = None,
) -> None:
    """Write the adapter, and results.json if its format can be published.

    Args:
        out: the folder.
        settings: of the run.
        resolved: the base.
        trainee: the trained model.
        data: the training data.
        tokenizer: saved beside the adapter.
        ends: ids of the tokens that end an answer, for the saved generation settings; none where it generates none.
        history: the trainer's log.
        seconds: wall time of the training, resumed parts included.
        pairs: what a training from votes does to pairs that were held out.
    """
    if ends:
        list_ends(trainee.model if settings.method in OURS else trainee.model.get_base_model(), ends)
    if settings.method in OURS:
        _cast_for_saving(settings, trainee)
        if trainee.kept:
            trainee.kept.remove()  # saving compares the base with its files
        trainee.model.save_pretrained(out, tokenizer=tokenizer)
        if trainee.kept:
            trainee.kept.add_to(out, settings.base, settings.base_revision)
    else:
        from minilora_hub.training.passthrough import save_peft_adapter

        save_peft_adapter(trainee.model, out, settings, resolved)
        tokenizer.save_pretrained(out)
    write_loss(out / LOSS_FILE, history, [spec.name for spec in parse_objectives(settings.objective)])
    settings.save(out)
    method = published_method(settings)
    if method is not None:
        _results(out, method, settings, resolved, trainee, data, history, seconds, pairs).save(out)


def list_ends(model: Any, ends: list[int]) -> None:
    """Put the ids of the tokens that end an answer into the generation settings that are saved with a model."""
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else list(ends)


def note_on_ends(
    settings: TrainingSettings, generation_config: Any, ends: list[int], tokenizer: Any
) -> tuple[str, ...]:
    """Return a note if loading the adapter will not use the saved generation settings.

    Args:
        settings: of the run.
        generation_config: the base's own.
        ends: ids of the tokens that end an answer.
        tokenizer: the base's.
    """
    known = end_token_ids(None, generation_config)
    lacking = [token for token in ends if token not in known]
    if not lacking or (settings.method in OURS and settings.method != "lora"):
        return ()
    names = " and ".join(tokenizer.convert_ids_to_tokens(lacking))
    return (
        f"answers end with {names}, which the base's generation settings do not list, and PEFT reads none from an "
        f"adapter's folder: generate with eos_token_id={ends}, or with GenerationConfig.from_pretrained(this folder)",
    )


def _cast_for_saving(settings: TrainingSettings, trainee: Trainee) -> None:
    """Convert the adapter to the dtype it is saved in; DoRA's magnitudes keep float32."""
    import torch

    for name, parameter in trainee.model.adapter_parameters().items():
        if "magnitude" not in name:
            parameter.data = parameter.data.to(getattr(torch, settings.recipe.save_dtype))


def published_method(settings: TrainingSettings) -> str | None:
    """Return the method's name in results.json; None for a PEFT method that is not of the LoRA family."""
    if settings.method in METHODS:
        return METHODS[settings.method]
    adapter = settings.recipe.adapter
    if str(adapter.get("peft_type")).upper() != "LORA":
        return None
    return "dora" if adapter.get("use_dora") else "lora"


def _results(
    out: Path,
    method: str,
    settings: TrainingSettings,
    resolved: ResolvedBase,
    trainee: Trainee,
    data: TrainingData,
    history: list[dict[str, float]],
    seconds: float,
    pairs: HeldOutPairs | None,
) -> Results:
    parameters = count_values(out / WEIGHTS)
    files = [Path(source).name for source in settings.data]
    from_hub = bool(settings.data) and not any(is_file(source) for source in settings.data)
    tokens, items = data.tokens, len(data.train)
    sources = tuple(
        DataSource(
            name,
            description=settings.about_data,
            # There are no counts per file.
            items=items if len(files) == 1 else None,
            tokens=tokens if len(files) == 1 else None,
        )
        for name in (settings.data if from_hub else files)
    )
    if data.votes:
        about = [settings.about_data, VOTES_NOTE, f"{pairs.described().capitalize()}." if pairs else None]
        description = " ".join(part for part in about if part)
        sources = (DataSource("votes", description=description, items=items, tokens=tokens),)
    return Results(
        method=method,
        base=base_facts(settings, resolved, trainee),
        parameters=parameters,
        share=round(parameters / trainee.base_parameters, 6),
        license=settings.license,
        language=settings.language,
        datasets=settings.data if from_hub else (),
        training=Training(
            data=sources,
            hyperparameters=hyperparameters(settings, data.labels),
            steps=int(max((entry["step"] for entry in history), default=0)),
            seconds=round(seconds, 1),
            hardware=_hardware(),
            libraries=library_versions(),
            loss=_loss_points(history),
            parent=trainee.parent.described(settings.learn) if trainee.parent else None,
        ),
    )


def base_facts(settings: TrainingSettings, resolved: ResolvedBase, trainee: Trainee) -> Base:
    """Return what results.json says of the base."""
    return Base(
        id=resolved.hub_id or resolved.path.name,
        revision=resolved.revision,
        fingerprint=trainee.fingerprint if trainee.fingerprint != "unknown" else None,
        parameters=trainee.base_parameters,
        license="apache-2.0" if resolved.embedded else None,
        note=_base_note(settings, resolved),
    )


def _base_note(settings: TrainingSettings, resolved: ResolvedBase) -> str | None:
    notes = [EMBEDDED_NOTE] if resolved.embedded else []
    if settings.recipe.quantize:
        double = settings.recipe.quantize == "nf4" and settings.recipe.double_quant
        kind = settings.recipe.quantize.upper() + (" with double quantisation" if double else "")
        notes.append(QUANTIZED_NOTE.format(kind=kind))
    return "; ".join(notes) or None


def hyperparameters(settings: TrainingSettings, labels: tuple[str, ...]) -> dict[str, Any]:
    """Return the rows of the card's table of hyper-parameters."""
    recipe = settings.recipe
    rows: dict[str, Any] = {
        "method": settings.method,
        "ranks": f"by EVA within {recipe.budget:,} parameters" if recipe.budget else None,
        "optimizer": recipe.optimizer,
        "learning rate": recipe.learning_rate,
        "schedule": recipe.schedule,
        "warm-up share": recipe.warmup,
        "epochs": None if recipe.max_steps else recipe.epochs,
        "batch size": recipe.batch_size,
        "batches": recipe.batching,
        "LoRA+ ratio": recipe.loraplus_ratio,
        "learning rate of the routers / of the experts": recipe.router_lr_ratio,
        "weight decay": recipe.weight_decay,
        "gradient norm at most": recipe.max_grad_norm or None,
        "seed": recipe.seed,
        "trained in": None if recipe.dtype == "auto" else f"{recipe.dtype}, the adapter in float32",
        "saved in": None if recipe.save_dtype == "float32" else recipe.save_dtype,
        "base quantised": recipe.quantize,
        "start": None if recipe.init == "zero" else f"{recipe.init}: makes up for the rounding of the quantized base",
        "loss on": None if labels else recipe.loss_on,
        "labels": ", ".join(labels) or None,
        "validation share": recipe.validation or None,
        "objectives": "; ".join(spec.shown() for spec in parse_objectives(settings.objective)) or None,
        "kept adapters": ", ".join(Path(name).name for name in settings.keep) or None,
    }
    return {name: value for name, value in rows.items() if value is not None}


def library_versions() -> dict[str, str]:
    """Return {package: version} for results.json."""
    return {name: version(name) for name in LIBRARIES}


def _hardware() -> str:
    """Return a description of the GPUs or the CPU, without the machine's name."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"CPU: {os.cpu_count()} cores of {name}"


def _loss_points(history: list[dict[str, float]]) -> tuple[tuple[int, float], ...]:
    """Return (step, training loss), thinned evenly to `POINTS`; the last one is kept."""
    points = [(int(entry["step"]), round(entry["loss"], 5)) for entry in history if "loss" in entry]
    every = max(1, -(-len(points) // POINTS))
    return tuple(point for index, point in enumerate(points) if (len(points) - 1 - index) % every == 0)


def write_loss(path: Path, history: list[dict[str, float]], objectives: Sequence[str] = ()) -> None:
    """Write every logged step: training loss, validation loss, learning rate, gradient norm, and each objective."""
    names = ("learning_rate", "grad_norm", *objectives)
    columns = {"loss": "loss", "eval_loss": "validation_loss"} | {name: name for name in names}
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        found = {column: entry[key] for key, column in columns.items() if key in entry}
        if found:
            rows.setdefault(int(entry["step"]), {}).update(found)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["step", *columns.values()])
    writer.writeheader()
    writer.writerows({"step": step, **rows[step]} for step in sorted(rows))
    write_whole(path, table.getvalue())
