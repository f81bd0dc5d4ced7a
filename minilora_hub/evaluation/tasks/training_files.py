"""The tasks' items as JSON lines: what `minilora train --data` takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from minilora_hub.errors import MiniLoraError
from minilora_hub.evaluation.tasks.items import SPLITS, Item
from minilora_hub.evaluation.tasks.registry import TASKS

MIX = "mix"


def mixed(names: tuple[str, ...], split: str, count: int) -> tuple[Item, ...]:
    """The first `count` items of each task, taking turns, so that every stretch of rows is a mix.

    Args:
        names: tasks.
        split: one of `SPLITS`.
        count: items of each.
    """
    return tuple(item for row in zip(*(TASKS[name].items(split, count) for name in names), strict=True) for item in row)


def write(out: Path, tasks: tuple[str, ...], splits: tuple[str, ...], count: int | None = None) -> dict[str, int]:
    """Write ``<task>.<split>.jsonl`` for each task and, of several, ``mix.<split>.jsonl``.

    Args:
        out: the folder; made if it is not there. Files of the same names are replaced.
        tasks: names of tasks; all if there are none.
        splits: what of each.
        count: items of each task, the first ones. Default: all; the mix then has as many of each as the smallest.

    Returns:
        How many rows each file has.

    Raises:
        MiniLoraError: an unknown task or split, `out` is a file, or a task has not so many items.
    """
    for what, given, known in (("task", tasks, tuple(TASKS)), ("split", splits, SPLITS)):
        for value in given:
            if value not in known:
                raise MiniLoraError(f"{what} {value!r}: must be one of {', '.join(known)}")
    if out.exists() and not out.is_dir():
        raise MiniLoraError(f"out={str(out)!r} is a file: must be a folder, there or new")
    names = tuple(name for name in TASKS if name in tasks) if tasks else tuple(TASKS)
    files: dict[str, tuple[Item, ...]] = {}
    for split in splits:
        try:
            made = {name: TASKS[name].items(split, count) for name in names}
        except ValueError as error:
            raise MiniLoraError(str(error)) from error
        files |= {f"{name}.{split}.jsonl": items for name, items in made.items()}
        if len(names) > 1:
            files[f"{MIX}.{split}.jsonl"] = mixed(names, split, min(map(len, made.values())))
    out.mkdir(parents=True, exist_ok=True)
    for name, items in files.items():
        lines = (json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
        part = out / f"{name}.part"
        part.write_text("".join(lines), encoding="utf-8")
        part.replace(out / name)
    return {name: len(items) for name, items in files.items()}
