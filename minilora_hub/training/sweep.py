"""`sweep`: the same training with other settings, again and again; the best on validation wins.

    grid    every combination of the listed values
    tpe     optuna's tree-structured Parzen estimator chooses values out of lists and ranges

Each trial is a training run in a folder of its own, named after its values, and as ready to publish as any other. What
is known so far lies in ``sweep.json``; a sweep that was killed goes on with the trial it was in. As its trials are
compared with each other, that is refused where code, libraries, data or base have changed since.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.code_inputs import changes, code_inputs, library_inputs
from minilora_hub.documents import write_whole
from minilora_hub.errors import DataError, MissingExtraError, TrainingError, TrainingInterrupted
from minilora_hub.recording.recorded_base import base_inputs
from minilora_hub.training.folder_lock import folder_lock, is_empty
from minilora_hub.training.run import TrainResult, train
from minilora_hub.training.run_state import STATE_FILE
from minilora_hub.training.settings import TrainingSettings, make_settings, read_yaml

SWEEP_FILE, TABLE_FILE, PLOT_FILE = "sweep.json", "sweep.csv", "sweep.png"
DEFAULT_VALIDATION = 0.1
DEFAULT_TRIALS = 20
TRIES = 1000
SHOWN = 3

# Hashed as this module is imported: what a file says later is not what this process runs.
CODE_AND_LIBRARIES = code_inputs("minilora_hub.training.sweep") | library_inputs("trl", "datasets", "optuna")

Search = Literal["grid", "tpe"]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; by their logarithm where both are above 0 and one is no integer."""

    low: float
    high: float

    @property
    def whole(self) -> bool:
        """Whether only integers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        values: what was varied: name -> value.
        folder: its name under the sweep's ``trials/``.
        state: ``"running"``, ``"finished"`` or ``"failed"``.
        validation_loss: the best one.
        step: where it was reached.
        seconds: training time.
        reason: why it failed.
    """

    values: dict[str, Any]
    folder: str
    state: str = "running"
    validation_loss: float | None = None
    step: int | None = None
    seconds: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to.

    Attributes:
        out: its folder.
        trials: finished ones first, the best at the top.
        best: None where every trial failed.
        left: how many trials the budget did not allow.
        notes: what could not be done, a line each.
    """

    out: Path
    trials: tuple[Trial, ...]
    best: Trial | None
    left: int | None = None
    notes: tuple[str, ...] = field(default=())


def sweep(
    out: str | Path,
    vary: dict[str, list[Any] | Range],
    *,
    search: Search = "grid",
    trials: int | None = None,
    minutes: float | None = None,
    progress: bool = False,
    on_trial: Callable[[int, Trial], None] | None = None,
    **said: Any,
) -> SweepResult:
    """Train with varied settings, and say which is best on validation.

    Args:
        out: the folder of the sweep; one that holds the same sweep is gone on with.
        vary: any field that `train` takes -> its values, or a `Range` for ``"tpe"``.
        search: ``"grid"`` or ``"tpe"``.
        trials: at most so many; default: the whole grid, or 20 for ``"tpe"``.
        minutes: training time at most; a trial that would probably end later is not begun.
        progress: show each run's bar on stderr.
        on_trial: called with a trial's number and the trial, as it begins and as it ends.
        **said: everything else `train` takes. A tenth of the rows is held out unless it says otherwise.

    Raises:
        TrainingError: something is wrong with the settings; trials that fail later are recorded as failed.
        TrainingInterrupted: a signal stopped it; the same call goes on.
    """
    out = Path(out)
    _check(vary, search, said, trials, minutes)
    config = read_yaml(Path(said["config"])) if said.get("config") else {}
    said = said | _validation(config, said, vary)
    # What is wrong with every trial stops here, and is not a failure of each.
    example = {name: values.low if isinstance(values, Range) else values[0] for name, values in vary.items()}
    settings = make_settings(config, _settings(said) | example)
    with folder_lock(out) if os.environ.get("RANK", "0") == "0" else nullcontext():  # one process of several writes
        asked = _asked(vary, search, said) | {"inputs": _inputs(settings, vary, said.get("config"), progress)}
        done = _read(out, asked)
        candidates = _grid(vary) if search == "grid" else _tpe(vary, settings.recipe.seed, done)
        most = trials if trials is not None else (_size(vary) if search == "grid" else DEFAULT_TRIALS)
        for number in range(1, most + 1):
            trial = _next(candidates, done, number)
            if trial is None or trial.state != "running":
                continue
            finished = [other for other in done if other.state == "finished"]
            used = sum(other.seconds for other in done)
            expected = used / len(finished) if finished else 0.0
            if minutes is not None and used + expected > minutes * 60:
                done = [other for other in done if other is not trial]
                break
            _write(out, asked, done)
            if on_trial:
                on_trial(number, trial)
            ended = _run(out, trial, said, progress)
            done[done.index(trial)] = ended
            _write(out, asked, done)
            if on_trial:
                on_trial(number, ended)
        return _finish(out, list(vary), done, most)


def _validation(config: dict[str, Any], said: dict[str, Any], vary: dict[str, Any]) -> dict[str, float]:
    """The share of rows that is held out, where neither the file nor the caller says on what to validate.

    Raises:
        TrainingError: they say that nothing is held out.
    """
    asked: dict[str, Any] = {}
    for source in (config, said):
        asked |= {name.replace("-", "_"): value for name, value in source.items() if value is not None}
    if asked.get("validation_data"):
        return {}
    varied = vary.get("validation", [asked.get("validation", DEFAULT_VALIDATION)])
    if 0 in ([varied.low] if isinstance(varied, Range) else varied):
        raise TrainingError(
            "validation=0: a sweep compares runs on held-out rows: pass a share above 0, or validation_data"
        )
    return {} if "validation" in asked or "validation" in vary else {"validation": DEFAULT_VALIDATION}


def _settings(said: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in said.items() if name != "config"}


def _next(candidates: Iterator[dict[str, Any]], done: list[Trial], number: int) -> Trial | None:
    """The trial of that number: one that is known, or a new one, which is added to `done`."""
    if number <= len(done):
        return done[number - 1]
    known = {trial.folder for trial in done}
    for values in itertools.islice(candidates, TRIES):  # lists of values run out, and a search then repeats itself
        trial = Trial(values, _folder_name(values))
        if trial.folder not in known:
            done.append(trial)
            return trial
    return None


def _run(out: Path, trial: Trial, said: dict[str, Any], progress: bool) -> Trial:
    folder = out / "trials" / trial.folder
    begun = (folder / STATE_FILE).is_file()
    if begun and json.loads((folder / STATE_FILE).read_text(encoding="utf-8")).get("finished"):
        begun = False  # it ended, but the sweep was killed before it was told: the run is quick to repeat, and certain
    if not begun and folder.exists():
        shutil.rmtree(folder)
    try:
        result: TrainResult = train(folder, resume=begun, progress=progress, record=False, **said | trial.values)
    except (TrainingInterrupted, DataError):
        raise
    except (TrainingError, ValueError) as error:  # a value that the method's configuration refuses, or a NaN
        return replace(trial, state="failed", reason=str(error))
    return replace(
        trial,
        state="finished",
        validation_loss=result.validation_loss,
        step=result.best_step,
        seconds=result.seconds,
    )


def parse_values(text: str) -> tuple[str, list[Any] | Range]:
    """``"learning_rate=1e-4,1e-3"`` or ``"learning_rate=1e-5..1e-3"`` as a name and values.

    Raises:
        TrainingError: it is written in another way.
    """
    import yaml

    from minilora_hub.training.settings import _plain

    name, equals, values = text.partition("=")
    low, dots, high = values.partition("..")
    try:
        if equals and name and dots:
            bounds = _plain(yaml.safe_load(low)), _plain(yaml.safe_load(high))
            if all(isinstance(bound, (int, float)) for bound in bounds) and bounds[0] < bounds[1]:
                return name.replace("-", "_"), Range(*bounds)
        elif equals and name and values:
            return name.replace("-", "_"), [_plain(yaml.safe_load(value)) for value in values.split(",")]
    except yaml.YAMLError:
        pass
    raise TrainingError(f"--vary {text!r}: must be NAME=VALUE,VALUE,… or NAME=LOW..HIGH")


def parse_varied(texts: Sequence[str]) -> dict[str, list[Any] | Range]:
    """Several texts for `parse_values` as {name: values}.

    Raises:
        TrainingError: one is written in another way, or a name is given twice.
    """
    varied: dict[str, list[Any] | Range] = {}
    for text in texts:
        name, values = parse_values(text)
        if name in varied:
            raise TrainingError(f"--vary {text!r}: {name} is given twice: list all its values in one")
        varied[name] = values
    return varied


def _check(
    vary: dict[str, list[Any] | Range], search: str, said: dict[str, Any], trials: int | None, minutes: float | None
) -> None:
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
        if name in said and said[name] is not None:
            raise TrainingError(f"{name} is varied and set to {said[name]!r}: leave one out")
    if search == "tpe":
        from importlib.util import find_spec

        if find_spec("optuna") is None:
            raise MissingExtraError("optuna", "search")


def _size(vary: dict[str, Any]) -> int:
    total = 1
    for values in vary.values():
        total *= len(values)
    return total


def _grid(vary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*vary.values()):
        yield dict(zip(vary, values, strict=True))


def _tpe(vary: dict[str, list[Any] | Range], seed: int, done: list[Trial]) -> Iterator[dict[str, Any]]:
    """What optuna asks for next; it is told of every trial that ended."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds: dict[str, Any] = {}
    for name, values in vary.items():
        if not isinstance(values, Range):
            kinds[name] = optuna.distributions.CategoricalDistribution(values)
        elif values.whole:
            kinds[name] = optuna.distributions.IntDistribution(int(values.low), int(values.high), log=values.low > 0)
        else:
            kinds[name] = optuna.distributions.FloatDistribution(values.low, values.high, log=values.low > 0)
    while True:
        ended = [trial for trial in done if trial.state == "finished"]
        sampler = optuna.samplers.TPESampler(seed=seed + len(done), n_startup_trials=5)
        study = optuna.create_study(direction="minimize", sampler=sampler)
        for trial in ended:
            study.add_trial(
                optuna.trial.create_trial(params=trial.values, distributions=kinds, value=trial.validation_loss)
            )
        yield dict(study.ask(kinds).params)


def _folder_name(values: dict[str, Any]) -> str:
    """``learning_rate=0.001,r=8``, with anything that a path cannot have replaced."""
    parts = (f"{name}={value:.6g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items())
    return "".join(c if c.isalnum() or c in "=,._-" else "_" for c in ",".join(parts))[:150]


# ---- what lies in the folder ----


def _asked(vary: dict[str, list[Any] | Range], search: str, said: dict[str, Any]) -> dict[str, Any]:
    varied = {name: asdict(values) if isinstance(values, Range) else values for name, values in vary.items()}
    fixed = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in said.items()}
    return {"search": search, "vary": varied, "said": {k: v for k, v in fixed.items() if v is not None}}


def _inputs(
    settings: TrainingSettings, vary: dict[str, Any], config: str | Path | None, progress: bool
) -> dict[str, str]:
    """Return what a trial's result depends on beside its settings: files, the base, code and libraries."""
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


def _read(out: Path, asked: dict[str, Any]) -> list[Trial]:
    file = out / SWEEP_FILE
    if not file.is_file():
        if not is_empty(out):
            raise TrainingError(f"out={str(out)!r}: must be empty or new, or hold a sweep")
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = [Trial(**trial) for trial in content["trials"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise TrainingError(f"{SWEEP_FILE} in {out.name!r} cannot be read ({error}): begin in another --out") from error
    asked = json.loads(json.dumps(asked))
    for part in ("search", "vary", "said"):
        if content.get(part) != asked[part]:
            raise TrainingError(f"out={str(out)!r} holds a sweep with other settings ({part}): pass another --out")
    if changed := changes(content.get("inputs") or {}, asked["inputs"]):
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise TrainingError(
            f"out={str(out)!r} holds trials that cannot be compared with new ones, because these have changed since: "
            f"{', '.join(changed[:SHOWN])}{more}; pass another --out"
        )
    return known


def _write(out: Path, asked: dict[str, Any], trials: list[Trial]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = asked | {"trials": [asdict(trial) for trial in trials]}
    write_whole(out / SWEEP_FILE, json.dumps(content, indent=2) + "\n")


def _finish(out: Path, names: list[str], trials: list[Trial], most: int) -> SweepResult:
    def rank(trial: Trial) -> float:
        return trial.validation_loss if trial.validation_loss is not None else float("inf")

    ordered = sorted((trial for trial in trials if trial.state != "running"), key=rank)
    best = ordered[0] if ordered and ordered[0].state == "finished" else None
    with (out / TABLE_FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "validation_loss", "step", "seconds", "state", "folder"])
        for trial in ordered:
            row = [trial.validation_loss, trial.step, trial.seconds, trial.state, f"trials/{trial.folder}"]
            writer.writerow([*(trial.values[name] for name in names), *row])
    notes = [f"{trial.folder} failed: {trial.reason}" for trial in ordered if trial.state == "failed"]
    try:
        from minilora_hub.training.plots import draw_sweep

        losses = [(trial.values, trial.validation_loss) for trial in ordered if trial.validation_loss is not None]
        draw_sweep(out / PLOT_FILE, names, losses)
    except MissingExtraError as error:
        notes.append(f"no plot: {error}")
    return SweepResult(out, tuple(ordered), best, most - len(ordered), tuple(notes))
