"""Sample the trials of a sweep with optuna, and store them in a journal, ``sweep.log``.

A trial whose process was killed has no result in the journal, so `TrialStore.next` returns it again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from minilora_hub.code_inputs import changes
from minilora_hub.errors import TrainingError
from minilora_hub.training.recipes import plain_value
from minilora_hub.training.run_folder import is_empty

JOURNAL_FILE = "sweep.log"
ATTEMPTS = 200
SHOWN = 3
LONGEST_NAME = 150  # of a trial's folder, in characters

Search = Literal["grid", "tpe"]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, inclusive; sampled on a log scale if both are above 0.

    Two integers are a range of integers.
    """

    low: float
    high: float


Varied = dict[str, list[Any] | Range]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        values: the varied settings: name -> value.
        folder: name of its folder in the sweep's ``trials/``.
        state: ``"running"``, ``"finished"`` or ``"failed"``.
        validation_loss: the best validation loss.
        step: the step with that loss.
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


def parse_varied(texts: Sequence[str]) -> Varied:
    """Parse texts such as ``"learning_rate=1e-4,1e-3"`` or ``"learning_rate=1e-5..1e-3"``.

    Raises:
        TrainingError: a text has another form, or a name is given twice.
    """
    varied: Varied = {}
    for text in texts:
        name, values = parse_values(text)
        if name in varied:
            raise TrainingError(f"--vary {text!r}: {name} is given twice: list all its values in one option")
        varied[name] = values
    return varied


def parse_values(text: str) -> tuple[str, list[Any] | Range]:
    """Parse one ``"NAME=VALUES"`` text into a name and its values.

    Raises:
        TrainingError: the text has another form, or a value is given twice.
    """
    import yaml

    name, _, values = text.partition("=")
    low, dots, high = values.partition("..")
    try:
        if name and dots:
            bounds = [plain_value(yaml.safe_load(bound)) for bound in (low, high)]
            if all(isinstance(bound, (int, float)) for bound in bounds) and bounds[0] < bounds[1]:
                return name.replace("-", "_"), Range(*bounds)
        elif name and values:
            listed = [plain_value(yaml.safe_load(value)) for value in values.split(",")]
            if len(set(_as_json(listed))) < len(listed):
                raise TrainingError(f"--vary {text!r}: a value is given twice: leave one out")
            if None not in listed:  # it would be the default, under another name
                return name.replace("-", "_"), listed
    except yaml.YAMLError:
        pass
    raise TrainingError(f"--vary {text!r}: must be NAME=VALUE,VALUE,… or NAME=LOW..HIGH")


class TrialStore:
    """Samples and stores the trials of a sweep.

    Args:
        out: the sweep's folder; a sweep in it is continued.
        vary: the varied settings.
        search: ``"grid"`` or ``"tpe"``.
        seed: seed of the grid's order, or of the search.
        request: arguments of the sweep by name, and under ``"inputs"`` the hashes of everything its results depend on.

    Raises:
        TrainingError: the folder holds something else, or a sweep whose trials cannot be compared with new ones.
    """

    def __init__(self, out: Path, vary: Varied, search: Search, seed: int, request: dict[str, Any]) -> None:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._vary, self._search, self._seed = vary, search, seed
        journal = out / JOURNAL_FILE
        if not journal.exists() and not is_empty(out):
            raise TrainingError(f"out={str(out)!r}: must be empty or new, or hold a sweep")
        try:
            lock = JournalFileOpenLock(str(journal))  # the default lock is a symlink, which needs privileges on Windows
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal), lock))
            sampler = optuna.samplers.RandomSampler()  # replaced for each trial
            self._study = optuna.create_study(storage=storage, sampler=sampler, study_name="sweep", load_if_exists=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{JOURNAL_FILE} in {out.name!r} cannot be read ({error}): use another --out"
            ) from error
        before = self._study.user_attrs.get("request")
        if before is not None:
            _require_comparable(out, before, json.loads(json.dumps(request)))
        else:
            self._study.set_user_attr("request", request)

    def trials(self) -> list[Trial]:
        """Return the trials so far, in order."""
        return [trial for _, trial in self._numbered().values()]

    def next(self) -> Trial | None:
        """Return a trial that has started but has no result, or a new trial; None if no combinations are left."""
        import optuna

        trials = self._numbered()
        if running := next((trial for _, trial in trials.values() if trial.state == "running"), None):
            return running
        for _ in range(ATTEMPTS):  # sampling from lists may repeat a combination
            sampler = self._sampler()
            if isinstance(sampler, optuna.samplers.GridSampler) and sampler.is_exhausted(self._study):
                return None
            self._study.sampler = sampler
            asked = self._study.ask({name: _distribution(values) for name, values in self._vary.items()})
            trial = self._trial(asked.params)
            if trial.folder not in trials:
                return trial
            self._tell(asked.number, None)
        return None

    def end(self, trial: Trial) -> None:
        """Store the result of a trial."""
        number, _ = self._numbered()[trial.folder]
        self._study.set_user_attr(trial.folder, asdict(trial))
        self._tell(number, trial.validation_loss)

    def _numbered(self) -> dict[str, tuple[int, Trial]]:
        """Return ``{folder: (optuna's number, trial)}``, without repetitions and trials whose values are incomplete."""
        found: dict[str, tuple[int, Trial]] = {}
        results = self._study.user_attrs
        for asked in self._study.get_trials(deepcopy=False):
            if len(asked.params) == len(self._vary):
                trial = self._trial(asked.params)
                result = results.get(trial.folder)
                found.setdefault(trial.folder, (asked.number, Trial(**result) if result else trial))
        return found

    def _trial(self, params: dict[str, Any]) -> Trial:
        values = {
            name: params[name] if isinstance(varied, Range) else json.loads(params[name])
            for name, varied in self._vary.items()
        }
        shown = {  # two numbers of a range that are alike in six digits are one trial; listed ones are what they are
            name: f"{value:.6g}" if isinstance(value, float) and isinstance(self._vary[name], Range) else value
            for name, value in values.items()
        }
        return Trial(values, _folder_name(shown))

    def _sampler(self) -> Any:
        from optuna.samplers import GridSampler, TPESampler

        if self._search == "grid":
            return GridSampler({name: _as_json(values) for name, values in self._vary.items()}, seed=self._seed)
        # The journal does not store the sampler's random state, so each trial has a separate seed.
        return TPESampler(seed=self._seed + len(self._study.trials), n_startup_trials=5)

    def _tell(self, number: int, loss: float | None) -> None:
        from optuna.samplers import RandomSampler
        from optuna.trial import TrialState

        # GridSampler would stop the study after its last trial, which optuna allows only inside `optimize`.
        self._study.sampler = RandomSampler()
        failed = loss is None or not math.isfinite(loss)
        self._study.tell(number, None if failed else loss, state=TrialState.FAIL if failed else None)


def _distribution(values: list[Any] | Range) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, Range):
        return CategoricalDistribution(_as_json(values))
    logarithmic = values.low > 0
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=logarithmic)
    return FloatDistribution(values.low, values.high, log=logarithmic)


def _as_json(values: Any) -> list[str]:
    """Return values as JSON strings, because optuna cannot store lists and treats 1 and true as equal."""
    return [json.dumps(value, default=str) for value in values]


def _folder_name(values: dict[str, Any]) -> str:
    """Return e.g. ``learning_rate=0.001,r=8``.

    Characters that a path may not contain become ``_``. Where that changes the name, or it is too long, a hash of what
    it would be ends it: two trials never share a folder.
    """
    name = ",".join(f"{name}={value}" for name, value in values.items())
    path = "".join(c if c.isalnum() or c in "=,._-" else "_" for c in name)
    if path == name and len(path) <= LONGEST_NAME:
        return path
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{path[: LONGEST_NAME - 9]}-{digest}"


def _require_comparable(out: Path, before: dict[str, Any], request: dict[str, Any]) -> None:
    for part in ("search", "vary", "settings"):
        if before.get(part) != request[part]:
            raise TrainingError(f"out={str(out)!r} holds a sweep with other settings ({part}): pass another --out")
    if changed := changes(before.get("inputs") or {}, request["inputs"]):
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise TrainingError(
            f"out={str(out)!r} holds trials that cannot be compared with new ones, because these have changed since: "
            f"{', '.join(changed[:SHOWN])}{more}; pass another --out"
        )
