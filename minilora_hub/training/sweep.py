"""Train an adapter repeatedly with varied settings, and find the settings with the lowest validation loss.

    grid    every combination of the listed values, in an order that follows from the seed
    tpe     optuna's tree-structured Parzen estimator samples values from lists and ranges

Each trial is a training run in a separate folder, which is named after its values and can be published. The same call
continues a sweep that was stopped or killed. Trials must stay comparable, so a sweep cannot be continued if code,
libraries, data or base have changed.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.code_inputs import code_inputs, library_inputs
from minilora_hub.errors import DataError, MissingExtraError, TrainingError, TrainingInterrupted
from minilora_hub.recording.recorded_base import base_inputs
from minilora_hub.training.run import broadcast, train
from minilora_hub.training.run_folder import folder_lock, read_state
from minilora_hub.training.settings import TrainingSettings, make_settings, read_yaml
from minilora_hub.training.sweep_report import draw_plot, write_table
from minilora_hub.training.sweep_trials import Range, Search, Trial, TrialStore, Varied

DEFAULT_VALIDATION = 0.1
DEFAULT_TRIALS = 20

# Hashed at import, because the files may change while this process runs.
CODE_AND_LIBRARIES = code_inputs("minilora_hub.training.sweep") | library_inputs("trl", "datasets", "optuna")


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep.

    Attributes:
        out: its folder.
        trials: the trials, finished ones first, by validation loss.
        best: the best trial; None if every trial failed.
        left: number of trials that the budget did not allow.
        notes: notes for the user, a line each.
        main: whether this is the process that writes and reports; in other processes `trials` is empty.
    """

    out: Path
    trials: tuple[Trial, ...] = ()
    best: Trial | None = None
    left: int | None = None
    notes: tuple[str, ...] = ()
    main: bool = True


def sweep(
    out: str | Path,
    vary: Varied,
    *,
    search: Search = "grid",
    trials: int | None = None,
    minutes: float | None = None,
    progress: bool = True,
    on_trial: Callable[[int, Trial], None] | None = None,
    **given: Any,
) -> SweepResult:
    """Train with varied settings, and return the trials ordered by validation loss.

    Args:
        out: the folder of the sweep; a sweep in it with the same arguments is continued.
        vary: any field that `train` takes -> its values, or a `Range` for ``"tpe"``.
        search: ``"grid"`` or ``"tpe"``.
        trials: the maximum number of trials. Default: the whole grid, or 20 for ``"tpe"``.
        minutes: the maximum training time; a trial that would probably exceed it is not started.
        progress: show each run's bar on stderr.
        on_trial: called with a trial's number and the trial, at its start and at its end.
        **given: all other arguments of `train`. By default a tenth of the rows is held out.

    Raises:
        MissingExtraError: optuna is not installed.
        TrainingError: the settings are wrong; trials that fail later are recorded as failed.
        TrainingInterrupted: a signal stopped it; the same call continues it.
    """
    out = Path(out)
    _check(vary, search, given, trials, minutes)
    config = read_yaml(Path(given["config"])) if given.get("config") else {}
    given = given | _validation(config, given, vary)
    for name in ("from_adapter", "from_votes", "objective", "keep"):
        if config.get(name) or given.get(name) or name in vary:
            raise TrainingError(f"{name}: a sweep trains fresh adapters on labels: pass it to minilora train")
    # Fail here if settings are wrong for every trial.
    example = {name: values.low if isinstance(values, Range) else values[0] for name, values in vary.items()}
    settings = make_settings(config, {name: value for name, value in given.items() if name != "config"} | example)
    sizes = [len(values) for values in vary.values() if not isinstance(values, Range)]
    most = trials or (DEFAULT_TRIALS if search == "tpe" else math.prod(sizes))
    main = os.environ.get("RANK", "0") == "0"  # the process that samples and writes
    with folder_lock(out) if main else nullcontext():
        store = None
        if main:
            request = _request(vary, search, given) | {"inputs": _inputs(settings, vary, given.get("config"), progress)}
            store = TrialStore(out, vary, search, settings.recipe.seed, request)
        while begun := broadcast(_begin(out, store, most, minutes) if store else None):
            number, trial, resume = begun
            if on_trial and store:
                on_trial(number, trial)
            trial = _run(out, trial, resume, given, progress)
            if store:
                store.end(trial)
                if on_trial:
                    on_trial(number, trial)
        return _finish(out, list(vary), store.trials(), most) if store else SweepResult(out, main=False)


def _check(vary: Varied, search: str, given: dict[str, Any], trials: int | None, minutes: float | None) -> None:
    if trials is not None and trials < 1:
        raise TrainingError(f"trials={trials!r}: must be at least 1")
    if minutes is not None and not minutes > 0:
        raise TrainingError(f"minutes={minutes!r}: must be above 0")
    if search not in ("grid", "tpe"):
        raise TrainingError(f"search={search!r}: must be grid or tpe")
    if not vary:
        raise TrainingError("nothing is varied: pass --vary NAME=VALUE,VALUE")
    for name, values in vary.items():
        if search == "grid" and isinstance(values, Range):
            raise TrainingError(f"vary {name}: a grid needs values, not a range: list them, or pass --search tpe")
        if given.get(name) is not None:
            raise TrainingError(f"{name} is varied and set to {given[name]!r}: leave one out")
    if find_spec("optuna") is None:
        raise MissingExtraError("optuna", "train")


def _validation(config: dict[str, Any], given: dict[str, Any], vary: Varied) -> dict[str, float]:
    """Return the default validation share, if neither the file nor the caller sets validation data.

    Raises:
        TrainingError: validation is turned off.
    """
    merged: dict[str, Any] = {}
    for source in (config, given):
        merged |= {name.replace("-", "_"): value for name, value in source.items() if value is not None}
    if merged.get("validation_data"):
        return {}
    shares = vary.get("validation", [merged.get("validation", DEFAULT_VALIDATION)])
    if 0 in ([shares.low] if isinstance(shares, Range) else shares):
        raise TrainingError(
            "validation=0: a sweep compares runs on held-out rows: pass a share above 0, or validation_data"
        )
    return {} if "validation" in merged or "validation" in vary else {"validation": DEFAULT_VALIDATION}


def _request(vary: Varied, search: str, given: dict[str, Any]) -> dict[str, Any]:
    varied = {name: asdict(values) if isinstance(values, Range) else values for name, values in vary.items()}
    fixed = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in given.items()}
    return {"search": search, "vary": varied, "settings": {k: v for k, v in fixed.items() if v is not None}}


def _inputs(
    settings: TrainingSettings, vary: dict[str, Any], config: str | Path | None, progress: bool
) -> dict[str, str]:
    """Return hashes of what a trial depends on besides its settings: files, the base, code and libraries."""
    from minilora_hub.bases.resolving import resolve_base
    from minilora_hub.remote_code.adapter_files import base_fingerprint

    files = {*vary.get("data", settings.data), *vary.get("validation_data", settings.validation_data)}
    files |= {os.fspath(config)} if config else set()
    found = {f"file/{name}": file_sha256(Path(name)) for name in sorted(files) if Path(name).is_file()}
    for name in vary.get("base", [settings.base]):
        base = resolve_base(name, revision=settings.base_revision, progress=progress)
        inputs = base_inputs(base, base_fingerprint(str(base.path)))
        found[f"base/{name}"] = hashlib.sha256(repr(inputs).encode()).hexdigest()
    return found | CODE_AND_LIBRARIES


def _begin(out: Path, store: TrialStore, most: int, minutes: float | None) -> tuple[int, Trial, bool] | None:
    """Return the next trial, its number, and whether to resume its run; None if budget or combinations are used up."""
    ended = [trial for trial in store.trials() if trial.state != "running"]
    finished = sum(trial.state == "finished" for trial in ended)
    used = sum(trial.seconds for trial in ended)
    expected = used / finished if finished else 0.0
    if len(ended) >= most or (minutes is not None and used + expected > minutes * 60):
        return None
    trial = store.next()
    if trial is None:
        return None
    folder = out / "trials" / trial.folder
    state = read_state(folder)
    # A finished run without a result in the journal was killed in between; it is quick to repeat.
    resume = state is not None and not state.finished
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    return len(ended) + 1, trial, resume


def _run(out: Path, trial: Trial, resume: bool, given: dict[str, Any], progress: bool) -> Trial:
    folder = out / "trials" / trial.folder
    try:
        result = train(folder, resume=resume, progress=progress, record=False, **given | trial.values)
    except (TrainingInterrupted, DataError):
        raise
    except (TrainingError, ValueError) as error:  # e.g. a value that the method's configuration rejects, or a NaN
        return replace(trial, state="failed", reason=str(error))
    return replace(
        trial,
        state="finished",
        validation_loss=result.validation_loss,
        step=result.best_step,
        seconds=result.seconds,
    )


def _finish(out: Path, names: list[str], trials: list[Trial], most: int) -> SweepResult:
    def rank(trial: Trial) -> float:
        return trial.validation_loss if trial.validation_loss is not None else math.inf

    ordered = sorted((trial for trial in trials if trial.state != "running"), key=rank)
    best = ordered[0] if ordered and ordered[0].state == "finished" else None
    write_table(out, names, ordered)
    notes = [f"{trial.folder} failed: {trial.reason}" for trial in ordered if trial.state == "failed"]
    try:
        draw_plot(out, names, ordered)
    except MissingExtraError as error:
        notes.append(f"no plot: {error}")
    return SweepResult(out, tuple(ordered), best, most - len(ordered), tuple(notes))
