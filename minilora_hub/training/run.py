"""Run one training (`train`), from settings to a folder that is ready to publish."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from minilora_hub.bases.resolving import resolve_base
from minilora_hub.errors import MiniLoraError, TrainingError, TrainingInterrupted
from minilora_hub.quiet import quiet_libraries
from minilora_hub.training.plan import Plan, Shape, make_plan
from minilora_hub.training.requirements import check_requirements
from minilora_hub.training.run_folder import (
    RunState,
    folder_lock,
    how_to_resume,
    is_empty,
    read_state,
    reason_of,
    resumed_settings,
)
from minilora_hub.training.settings import SETTINGS_FILE, TrainingSettings, read_yaml
from minilora_hub.training.sharding import gather_adapter
from minilora_hub.whole_folders import require_writable

if TYPE_CHECKING:
    from minilora_hub.training.preference import Dpo, HeldOutPairs


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        out: the folder, ready for ``minilora push``.
        steps: optimizer steps.
        loss: the last training loss; None after a dry run.
        validation_loss: the best validation loss, whose weights were saved; None without validation.
        best_step: the step with that loss.
        seconds: training time, resumed parts included.
        plan: the plan that was printed.
        skipped: a line for each skipped row.
        main: whether this is the process that writes and reports.
        notes: notes for the user, a line each.
        pairs: of a training from votes, in how many held-out pairs the chosen answer is the likelier one.
    """

    out: Path
    steps: int
    loss: float | None
    validation_loss: float | None
    best_step: int | None
    seconds: float
    plan: Plan
    skipped: tuple[str, ...] = ()
    main: bool = True
    notes: tuple[str, ...] = ()
    pairs: HeldOutPairs | None = None


def train(
    out: str | Path,
    *,
    method: str | None = None,
    base: str | None = None,
    data: str | tuple[str, ...] | list[str] | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    on_plan: Callable[[Plan, TrainingSettings], None] | None = None,
    record: bool = True,
    **overrides: Any,
) -> TrainResult:
    """Train an adapter, and write a folder that `minilora push` can publish.

    Args:
        out: the folder: new or empty, unless a run in it is resumed.
        method: ``"lora"``, ``"dora"``, ``"mixlora"``, ``"mixdora"``, or another name in `recipes.RECIPES`. With
            ``from_adapter=`` method, base and the adapter's fields are those of that adapter.
        base: ``"embedded"``, a folder or a Hub id.
        data: files (``.jsonl``, ``.csv``, ``.parquet``, ``.txt``, ``.md``), or the id of a data set on the Hub; or with
            ``from_votes=`` a file of votes.
        config: a YAML file of overrides.
        resume: continue from the last checkpoint in `out`, with the settings that the run began with.
        dry_run: make the plan only; write nothing.
        progress: show a bar on stderr.
        on_plan: called with the plan before training starts.
        record: record reference logits at the end, so that a push does not have to load the base.
        **overrides: any field of `settings.TrainingSettings`, `recipes.Recipe` or the method's own configuration.

    Raises:
        TrainingError: settings or data are wrong, or training stopped; the message says which checkpoint is saved.
        TrainingInterrupted: a signal stopped it, after a checkpoint was saved.
    """
    out = Path(out)
    given = overrides | {"method": method, "base": base, "data": data}
    settings = resumed_settings(out, given, config) if resume else None
    if settings is None:
        from minilora_hub.training.parent_adapter import complete_settings

        settings = complete_settings(read_yaml(Path(config)) if config else {}, given)
    with quiet_libraries():  # their output during import
        check_requirements(settings)
        import datasets  # noqa: F401  whose bars are switched off below

        from minilora_hub.training.loop import known_warnings_ignored

    with quiet_libraries(), known_warnings_ignored():
        place = _process()
        # Only one process writes.
        writes = place.is_main_process and not dry_run
        if dry_run and place.is_main_process:  # a dry run says whether a run would work
            require_writable(out)
        with folder_lock(out) if writes else nullcontext():
            begun_before = (out / SETTINGS_FILE).is_file()
            if writes and not (resume and begun_before) and not is_empty(out):
                hint = "it must be empty or new"
                if begun_before:
                    hint = "it holds a run: pass --resume to continue it, or another --out"
                raise TrainingError(f"out={str(out)!r}: {hint}")
            with TemporaryDirectory(prefix="minilora-rows-", ignore_cleanup_errors=True) as folder:
                shown = progress and place.is_main_process
                result = _execute(out, settings, place, Path(folder), resume, dry_run, shown, on_plan)
            if record and writes:  # the trained model was freed, so there is memory for the base
                result = replace(result, notes=(*result.notes, *record_logits(out, settings)))
            return result


def _process() -> Any:
    """Return accelerate's state of this process."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()))


def broadcast(value: Any) -> Any:
    """Return the main process's value on every process of a run."""
    if _process().num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _execute(
    out: Path,
    settings: TrainingSettings,
    place: Any,
    folder: Path,
    resume: bool,
    dry_run: bool,
    progress: bool,
    on_plan: Callable[[Plan, TrainingSettings], None] | None,
) -> TrainResult:
    """Train and save; `folder` holds files that are needed until the run ends."""
    from safetensors import SafetensorError

    from minilora_hub.training.adapter_checkpoints import CHECKPOINTS, last_checkpoint
    from minilora_hub.training.loop import build_trainer, collected_notes
    from minilora_hub.training.models import build_trainee, check_embedding
    from minilora_hub.training.outputs import write_result
    from minilora_hub.training.parent_adapter import hashes_of_inputs
    from minilora_hub.training.preference import Dpo
    from minilora_hub.training.row_kinds import kind_of

    main = place.is_main_process
    before = read_state(out) if resume else None
    if before and before.finished:
        raise TrainingError(f"--resume: the run in {str(out)!r} is finished: pass another --out for a new one")
    begun = (before and before.begun) or broadcast(datetime.now().isoformat(timespec="seconds"))
    base = resolve_base(settings.base, revision=settings.base_revision, progress=progress)
    kind = kind_of(settings, base)
    data, tokenizer = kind.prepare(folder, datetime.fromisoformat(begun)), kind.tokenizer
    inputs = hashes_of_inputs(settings)
    state = before or RunState(data.sha256, begun=begun, inputs=inputs)
    if state.data_sha256 != data.sha256:
        raise TrainingError("--resume: the data has changed since the run began: restore it, or start a new run")
    if changed := sorted(name for name in inputs if state.inputs.get(name) != inputs[name]):
        raise TrainingError(f"--resume: {changed[0]!r} has changed since the run began: restore it, or start a new run")
    distribution = None
    if settings.recipe.budget is not None:
        from minilora_hub.training.eva import distribute

        distribution = distribute(settings, base, data.train, tokenizer.pad_token_id, progress)
    with collected_notes() as notes:
        chosen = distribution.settings if distribution else settings
        trainee, notes_on_parent = build_trainee(chosen, base, kind.auto_class, kind.model_arguments)
    if distribution:
        distribution.start(trainee.model)
    notes += notes_on_parent
    start = None
    if settings.recipe.init != "zero":
        from minilora_hub.training.compensation import compensate

        start = compensate(trainee.model, settings, base, data.train).described(settings.recipe.init)
    check_embedding(trainee.model, tokenizer, max(data.largest_id, tokenizer.pad_token_id), base)
    scratch = folder / "plan"  # a trainer creates its folder at once, and a dry run must not leave one
    trainer, shape = build_trainer(settings, trainee, data, kind, scratch, place.num_processes)
    plan = make_plan(settings, data, trainee, shape, kind, trainer)
    plan = replace(plan, ranks=distribution.described if distribution else None, init=start)
    if on_plan is not None and main:
        on_plan(plan, settings)
    skipped = tuple(f"{row.place}: {row.reason}" for row in data.skipped)
    if dry_run:
        return TrainResult(out, 0, None, None, None, 0.0, plan, skipped, main, tuple(notes))
    if main:
        out.mkdir(parents=True, exist_ok=True)
        settings.save(out)
        state.save(out)
    trainer.args.output_dir = str(out / CHECKPOINTS)
    dpo = next(one for one in trainer.objectives if isinstance(one, Dpo)) if data.votes else None
    seconds = round(state.seconds + _train(trainer, out, shape, state, resume, progress, dpo), 2)
    history = trainer.state.log_history
    if settings.recipe.shard:
        gather_adapter(trainee.model)
    pairs = dpo.likelier(trainee.model, data.validation) if dpo and main and data.held_out_pairs else None
    if main:
        try:
            write_result(out, settings, base, trainee, data, kind.processor, kind.ends, history, seconds, pairs)
            replace(state, seconds=seconds, finished=True).save(out)
        except (OSError, SafetensorError) as error:
            saved = last_checkpoint(out)
            raise TrainingError(
                f"out={str(out)!r}: the result could not be written ({reason_of(error)}); "
                f"{how_to_resume(out, saved.name if saved else None)}"
            ) from error
        notes += kind.notes()
    trainer.accelerator.wait_for_everyone()
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return TrainResult(
        out=out,
        steps=trainer.state.global_step,
        loss=losses[-1] if losses else None,
        validation_loss=trainer.state.best_metric,
        best_step=trainer.state.best_global_step,
        seconds=round(seconds, 1),
        plan=plan,
        skipped=skipped,
        main=main,
        notes=tuple(notes),
        pairs=pairs,
    )


def _train(
    trainer: Any, out: Path, shape: Shape, state: RunState, resume: bool, progress: bool, dpo: Dpo | None
) -> float:
    """Train, and return the seconds it took."""
    from minilora_hub.training.adapter_checkpoints import last_checkpoint
    from minilora_hub.training.callbacks import ProgressShown, StoppedBySignal

    started = time.perf_counter()
    try:
        if dpo:
            dpo.start(trainer.model, progress)
    except KeyboardInterrupt:
        message = f"stopped before a step: minilora train --resume --out {out} continues"
        raise TrainingInterrupted(message, signal.SIGINT) from None
    checkpoint = last_checkpoint(out) if resume else None
    if checkpoint and checkpoint.name == f"checkpoint-{shape.steps}":
        trainer.take_over(checkpoint)  # the run was killed after its last step
        return 0.0
    shown = ProgressShown(progress)

    def elapsed() -> float:
        return time.perf_counter() - started

    trainer.on_saved = lambda: replace(state, seconds=round(state.seconds + elapsed(), 2)).save(out)
    trainer.add_callback(shown)
    try:
        with StoppedBySignal() as stop:
            trainer.add_callback(stop)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        shown.close()
    if stop.number is not None and trainer.state.global_step < shape.steps:
        raise TrainingInterrupted(
            f"stopped after step {trainer.state.global_step} of {shape.steps}, which is saved: "
            f"minilora train --resume --out {out} continues",
            stop.number,
        )
    return elapsed()


def record_logits(out: Path, settings: TrainingSettings) -> tuple[str, ...]:
    """Record the reference logits of the saved adapter, and return notes for the user.

    The adapter is saved already: if this fails, a note says so, and a push records the logits.
    """
    from minilora_hub.recording.reference import store_recording
    from minilora_hub.training.outputs import published_method

    if published_method(settings) is None:
        return ()
    gc.collect()
    try:
        store_recording(out, resolve_base(settings.base, revision=settings.base_revision, progress=False))
    except (MiniLoraError, ValueError, OSError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return (f"the reference logits could not be recorded, so a push will record them: {reason}",)
    return ()
