"""Write the items of tasks as JSON lines, for `minilora train --data`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from minilora_hub.errors import MiniLoraError
from minilora_hub.evaluation.tasks.items import SPLITS, Item
from minilora_hub.evaluation.tasks.registry import TASKS

MIX = "mix"


def mixed(names: tuple[str, ...], split: str, count: int) -> tuple[Item, ...]:
    """Return the first `count` items of each task, alternating between the tasks.

    Args:
        names: tasks.
        split: one of `SPLITS`.
        count: items of each.
    """
    return tuple(item for row in zip(*(TASKS[name].items(split, count) for name in names), strict=True) for item in row)


def write(out: Path, tasks: tuple[str, ...], splits: tuple[str, ...], count: int | None = None) -> dict[str, int]:
    """Write ``<task>.<split>.jsonl`` for each task and, of several, ``mix.<split>.jsonl``.

    Args:
        out: the folder, created if missing. Files of the same names are replaced.
        tasks: names of tasks; all if empty.
        splits: the splits to write.
        count: the first items of each task. Default: all; the mix then has as many of each as the smallest.

    Returns:
        The number of rows of each file.

    Raises:
        MiniLoraError: a task or split is unknown, `out` is a file, or a task has fewer items.
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
