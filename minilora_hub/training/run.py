"""`train`: one run from settings to a folder that is ready to publish."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minilora_hub.bases.end_tokens import end_token_ids
from minilora_hub.bases.resolving import ResolvedBase, resolve_base
from minilora_hub.errors import MiniLoraError, TrainingError, TrainingInterrupted
from minilora_hub.quiet import quiet_libraries
from minilora_hub.training.folder_lock import folder_lock, is_empty
from minilora_hub.training.plan import Plan, Shape, make_plan
from minilora_hub.training.requirements import check_requirements
from minilora_hub.training.run_state import RunState, read_state
from minilora_hub.training.settings import SETTINGS_FILE, TrainingSettings, make_settings, read_yaml


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        out: the folder, ready for ``minilora push``.
        steps: optimizer steps.
        loss: the last training loss; None after a dry run.
        validation_loss: the best one, whose weights were kept; None without validation.
        best_step: the step it was reached at.
        seconds: training time, resumed parts included.
        plan: what was planned.
        skipped: a line for each row that was left out.
        main: whether this process is the one that writes and reports, of several.
        notes: what the user should know, a line each.
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


def train(
    out: str | Path,
    *,
    method: str | None = None,
    base: str | None = None,
    data: str | tuple[str, ...] | list[str] | None = None,
    config: str | Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    progress: bool = False,
    on_plan: Callable[[Plan, TrainingSettings], None] | None = None,
    record: bool = True,
    **overrides: Any,
) -> TrainResult:
    """Train an adapter, and write the folder that `minilora push` publishes.

    Args:
        out: the folder: new or empty, unless a run in it is resumed.
        method: ``"lora"``, ``"dora"``, ``"mixlora"``, ``"mixdora"``, or another name in `recipes.RECIPES`.
        base: ``"embedded"``, a folder or a Hub id.
        data: files (``.jsonl``, ``.csv``, ``.parquet``), or the id of a data set on the Hub.
        config: a YAML file of overrides.
        resume: go on from the last checkpoint in `out`; the settings are those the run began with.
        dry_run: make the plan, train nothing, write nothing.
        progress: show a bar on stderr.
        on_plan: called with the plan before training starts.
        record: record at the end what the saved adapter computes, so that a push need not load the base.
        **overrides: any field of `settings.TrainingSettings`, `recipes.Recipe` or the method's own configuration.

    Raises:
        TrainingError: settings or data are wrong, or the training had to stop; the message says what is kept.
        TrainingInterrupted: a signal stopped it, after a checkpoint was saved.
    """
    out = Path(out)
    said = overrides | {"method": method, "base": base, "data": data}
    settings = _resumed_settings(out, said, config) if resume else None
    if settings is None:
        settings = make_settings(read_yaml(Path(config)) if config else {}, said)
    with quiet_libraries():  # as some are imported
        check_requirements(settings)
        import datasets  # noqa: F401  whose bars are switched off below

        from minilora_hub.training.loop import known_warnings_ignored

    with quiet_libraries(), known_warnings_ignored():
        run = _Run(out, settings, resume, progress)
        # One process of several writes.
        with folder_lock(out) if run.main and not dry_run else nullcontext():
            if run.main and not resume and not dry_run:
                _require_empty(out)
            result = run.execute(dry_run, on_plan)
            if record and result.main and not dry_run:
                # The model that was trained is gone by now, so its memory can hold the base once more.
                result = replace(result, notes=(*result.notes, *run.record()))
            return result


def _resumed_settings(out: Path, said: dict[str, Any], config: str | Path | None) -> TrainingSettings | None:
    """The settings a run began with; None where it never began. What is said again must be the same."""
    if not (out / SETTINGS_FILE).is_file():
        if said.get("method"):
            return None
        raise TrainingError(f"--resume: {str(out)!r} holds no {SETTINGS_FILE}, so no run to resume")
    before = read_yaml(out / SETTINGS_FILE)
    settings = make_settings(before)
    asked = make_settings(before, read_yaml(Path(config)) if config else {}, said).to_dict()
    for name, value in settings.to_dict().items():
        if asked[name] != value:
            raise TrainingError(
                f"--resume: the run began with {name}={value!r}, now it is {asked[name]!r}: leave it out"
            )
    return settings


def _require_empty(out: Path) -> None:
    if not is_empty(out):
        known = (out / SETTINGS_FILE).is_file()
        hint = (
            "it holds a run: pass --resume to go on with it, or another --out" if known else "it must be empty or new"
        )
        raise TrainingError(f"out={str(out)!r}: {hint}")


class _Run:
    """The steps of a run; they share the base, which is large."""

    def __init__(self, out: Path, settings: TrainingSettings, resume: bool, progress: bool) -> None:
        from accelerate import PartialState

        self.out, self.settings, self.resume = out, settings, resume
        place = PartialState(cpu=not _has_accelerator())
        self.main, self.processes = place.is_main_process, place.num_processes
        self.progress = progress and self.main

    def execute(self, dry_run: bool, on_plan: Callable[[Plan, TrainingSettings], None] | None) -> TrainResult:
        with TemporaryDirectory(prefix="minilora-rows-", ignore_cleanup_errors=True) as folder:
            return self._execute(Path(folder), dry_run, on_plan)

    def _execute(
        self, folder: Path, dry_run: bool, on_plan: Callable[[Plan, TrainingSettings], None] | None
    ) -> TrainResult:
        """Run, with the rows' tokens in a folder."""
        from minilora_hub.training.dataset import prepare_data
        from minilora_hub.training.loop import build_trainer
        from minilora_hub.training.models import (
            base_context,
            base_generation_config,
            build_trainee,
            check_embedding,
            load_tokenizer,
        )
        from minilora_hub.training.trainer import CHECKPOINTS

        before = self._state_before()
        begun = (before and before.begun) or self._now()
        resolved = self._find_base(self.progress)
        tokenizer = load_tokenizer(resolved)
        generation = base_generation_config(resolved)
        ends = end_token_ids(tokenizer, generation)
        now = datetime.fromisoformat(begun)
        data = prepare_data(self.settings, tokenizer, base_context(resolved), folder, ends=ends, now=now)
        state = before or RunState(data.sha256, begun=begun)
        if state.data_sha256 != data.sha256:
            raise TrainingError("--resume: the data is not what the run began with: restore it, or begin anew")
        with told_of_targets() as notes:
            trainee = build_trainee(self.settings, resolved)
        check_embedding(trainee.model, tokenizer, max(data.largest_id, tokenizer.pad_token_id), resolved)
        scratch = folder / "plan"  # a trainer makes its folder at once, and a plan must leave none
        trainer, shape = build_trainer(self.settings, trainee, data, tokenizer, scratch, self.processes)
        plan = make_plan(self.settings, data, trainee, shape, tokenizer, ends, trainer.args.device)
        if on_plan is not None and self.main:
            on_plan(plan, self.settings)
        skipped = tuple(f"{row.place}: {row.reason}" for row in data.skipped)
        if dry_run:
            return TrainResult(self.out, 0, None, None, None, 0.0, plan, skipped, self.main, tuple(notes))
        if self.main:
            self.out.mkdir(parents=True, exist_ok=True)
            self.settings.save(self.out)
            state.save(self.out)
        trainer.args.output_dir = str(self.out / CHECKPOINTS)
        seconds = self._train(trainer, shape, state)
        history = trainer.state.log_history
        if self.main:
            from minilora_hub.training.outputs import note_on_ends, write_result

            took = state.seconds + seconds
            write_result(self.out, self.settings, resolved, trainee, data, tokenizer, ends, history, took)
            state.after(seconds, finished=True).save(self.out)
            notes += note_on_ends(self.settings, generation, ends, tokenizer)
        trainer.accelerator.wait_for_everyone()
        losses = [entry["loss"] for entry in history if "loss" in entry]
        return TrainResult(
            out=self.out,
            steps=trainer.state.global_step,
            loss=losses[-1] if losses else None,
            validation_loss=trainer.state.best_metric,
            best_step=trainer.state.best_global_step,
            seconds=round(state.seconds + seconds, 1),
            plan=plan,
            skipped=skipped,
            main=self.main,
            notes=tuple(notes),
        )

    def _find_base(self, progress: bool) -> ResolvedBase:
        return resolve_base(self.settings.base, revision=self.settings.base_revision, progress=progress)

    def record(self) -> tuple[str, ...]:
        """Record what the adapter computes as it was saved; return what the user should know.

        The run is over and saved: where this fails, the user is told, and a push does it.
        """
        from minilora_hub.recording.reuse import keep_recording
        from minilora_hub.training.outputs import published_method

        if published_method(self.settings) is None:
            return ()
        gc.collect()
        try:
            keep_recording(self.out, self._find_base(progress=False))
        except (MiniLoraError, ValueError, OSError, RuntimeError, MemoryError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            return (f"what the adapter computes could not be recorded, a push does it: {reason}",)
        return ()

    def _state_before(self) -> RunState | None:
        """The state of the run that is resumed; None if a new one begins."""
        before = read_state(self.out) if self.resume else None
        if before is not None and before.finished:
            raise TrainingError(f"--resume: the run in {str(self.out)!r} is finished: pass another --out for a new one")
        return before

    def _now(self) -> str:
        """The time in ISO format, the same on all processes."""
        now = [datetime.now().isoformat(timespec="seconds")]
        if self.processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(now)
        return now[0]

    def _train(self, trainer: Any, shape: Shape, state: RunState) -> float:
        """Train, and return the seconds it took."""
        from minilora_hub.training.callbacks import ProgressShown, StoppedBySignal
        from minilora_hub.training.trainer import last_checkpoint

        checkpoint = last_checkpoint(self.out) if self.resume else None
        if checkpoint and checkpoint.name == f"checkpoint-{shape.steps}":
            trainer.take_over(checkpoint)  # it was killed after its last step
            return 0.0
        shown, started = ProgressShown(self.progress), time.perf_counter()

        def elapsed() -> float:
            return time.perf_counter() - started

        trainer.on_saved = lambda: state.after(elapsed()).save(self.out)
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
                f"minilora train --resume --out {self.out} goes on",
                stop.number,
            )
        return elapsed()


@contextmanager
def told_of_targets() -> Iterator[list[str]]:
    """Collect what is said inside of targets that were left out, instead of letting it be printed."""
    from minilora_hub.remote_code.probe import TargetsWarning

    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TargetsWarning)
        yield notes
    for warning in caught:
        if issubclass(warning.category, TargetsWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()
