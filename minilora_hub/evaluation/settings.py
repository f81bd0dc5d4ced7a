"""The settings of a run, checked before anything is loaded; its adapters, their base, and the items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minilora_hub.bases.loading import DTYPES
from minilora_hub.errors import AdapterError
from minilora_hub.evaluation.answer_cache import adapter_digest
from minilora_hub.evaluation.tasks.items import SPLITS

if TYPE_CHECKING:
    from minilora_hub.evaluation.tasks.items import Item, Task

HELD_OUT = "held_out"
FEW_SHOT = 4
BATCH_SIZE = 64


@dataclass(frozen=True)
class Settings:
    """What is measured and how.

    Attributes:
        tasks: names of tasks, in order.
        split: one of `items.SPLITS`.
        held_out: whether the items in a format that is not in training are also measured.
        count: items of each task and split; None for all.
        few_shot: number of examples in a second measurement of the base; 0 for none.
        perplexity: whether perplexity on general text is measured.
        text: the text for it; None for the default.
        dtype: ``"float32"``, or ``"bfloat16"`` or ``"int8"``, which may change some answers; see `load_base`.
        batch_size: the most rows of a batch.

    Raises:
        ValueError: a setting is out of range; the message names it, the value received and what is required.
    """

    tasks: tuple[str, ...]
    split: str = "test"
    held_out: bool = False
    count: int | None = None
    few_shot: int = FEW_SHOT
    perplexity: bool = False
    text: Path | None = None
    dtype: str = "float32"
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        """Check the values."""
        twice = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        _require(not twice, "task", twice, "named once each")
        _require(self.split in SPLITS, "split", self.split, f"one of {', '.join(SPLITS)}")
        _require(self.count is None or self.count >= 1, "count", self.count, "at least 1")
        _require(self.few_shot >= 0, "few_shot", self.few_shot, "at least 0")
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        _require(self.perplexity or self.text is None, "text", str(self.text), "given with perplexity only")


def _require(holds: bool, name: str, value: object, need: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: must be {need}")


@dataclass(frozen=True)
class Adapter:
    """An adapter that is measured.

    Attributes:
        name: the name that was given.
        folder: its folder.
        local: whether the folder is the user's own, not a copy from the Hub.
        method: ``"mixlora"``, ``"dora"`` or ``"lora"``.
        base: the base it names.
        fingerprint: of the base it was trained on, or ``"unknown"``.
    """

    name: str
    folder: Path
    local: bool
    method: str
    base: str | None
    fingerprint: str

    @property
    def digest(self) -> str:
        """Hash of the files that determine its answers."""
        return adapter_digest(self.folder)


def find_adapters(names: Sequence[str | Path]) -> tuple[Adapter, ...]:
    """Find adapters by folder or Hub id. None of their code runs.

    Raises:
        AdapterError: one does not exist, or is of no known kind.
        ValueError: one is named twice.
    """
    from minilora_hub.compare.found_adapters import find_adapter

    found = []
    for name in names:
        one = find_adapter(name)
        found.append(Adapter(str(name), one.folder, Path(name).is_dir(), one.method, one.base, one.fingerprint))
    twice = sorted({adapter.name for adapter in found if sum(adapter.name == other.name for other in found) > 1})
    _require(not twice, "adapters", twice, "named once each")
    return tuple(found)


def require_generating(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters of models that do not generate text.

    Raises:
        AdapterError: there is one; the message names it and its Auto class.
    """
    from minilora_hub.adapter_folder.folders import read_source
    from minilora_hub.adapter_folder.tasks import CAUSAL_LM

    for adapter in adapters:
        name = read_source(adapter.folder).auto_class
        if name != CAUSAL_LM:
            labelled = name in ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")
            hint = (
                ": measure it on rows with labels, --data FILE" if labelled else ", and this measures generated texts"
            )
            raise AdapterError(f"{adapter.name}: is for {name}{hint}")


def find_tasks(settings: Settings) -> dict[str, Task]:
    """Return the tasks of a run by name.

    Raises:
        ValueError: there is no task of this name.
        MissingExtraError: a library that makes one is not installed.
    """
    from minilora_hub.evaluation.tasks.registry import TASKS

    unknown = [name for name in settings.tasks if name not in TASKS]
    if unknown:
        raise ValueError(f"task={unknown[0]!r}: must be one of {', '.join(TASKS)}")
    return {name: TASKS[name] for name in settings.tasks}


def find_items(tasks: dict[str, Task], settings: Settings) -> dict[str, tuple[Item, ...]]:
    """Return the items of each task, and under `held_out_key` those in a format that is not in training.

    Raises:
        ValueError: a task has none in this split, or fewer than `count`.
        MissingExtraError: a library that makes them is not installed.
    """
    items = {name: task.items(settings.split, settings.count) for name, task in tasks.items()}
    for name, some in items.items():
        if not some:
            raise ValueError(f"task={name!r}: has no items in split {settings.split!r}")
    if settings.held_out and settings.split != HELD_OUT:
        # There are fewer of these: at most `count`.
        extra = {held_out_key(name): task.items(HELD_OUT)[: settings.count] for name, task in tasks.items()}
        items |= {key: some for key, some in extra.items() if some}
    return items


def held_out_key(task: str) -> str:
    """Return the key of a task's items in a format that is not in training."""
    return f"{task} {HELD_OUT}"


def task_of(key: str) -> str:
    """Return the task of a key of `find_items`."""
    return key.removesuffix(f" {HELD_OUT}")
