"""The comparison that the page opens with: recorded once by running it, then shown again, and labelled so. No Gradio.

A recording belongs to the adapters it was made with: a page over others does not show it. After a shipped adapter has
changed, record again::

    python -m minilora_hub.demo.runs.replay
    python -m minilora_hub.demo.runs.replay --base org/model --adapter me/poet --prompt "…" --out mine.json

``MINILORA_REPLAY=mine.json`` makes a page open with a recording of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import torch

from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.compare.engine import Column, CompareEngine, Sampling
from minilora_hub.demo.adapters.columns import describe_columns
from minilora_hub.demo.ui.page_state import Comparison
from minilora_hub.errors import MiniLoraError

SHIPPED = Path(__file__).parent / "replay.json"
PROMPT = (
    "JSON with name, age, city of the dietitian: Joyce Henson of Ebersberg is an ergonomist, while Sara Carey of "
    "Potsdam is a dietitian and 18."
)
COMMAND = "python -m minilora_hub.demo.runs.replay"


def find_replay(engine: CompareEngine) -> dict[str, Any] | None:
    """Find the recording for the models of a page.

    Returns:
        ``{"stage", "status"}`` as the page shows them, or None where the shipped one is of other models.

    Raises:
        MiniLoraError: ``MINILORA_REPLAY`` names a file that is no recording, or one of other models.
    """
    named = os.environ.get("MINILORA_REPLAY")
    recording = _read(Path(named) if named else SHIPPED)
    differs = difference(recording, engine)
    if differs is None:
        return {"stage": recording["stage"], "status": recording["status"]}
    if named:
        raise MiniLoraError(f"MINILORA_REPLAY={named!r}: {differs}; record again with {COMMAND}")
    return None


def difference(recording: dict[str, Any], engine: CompareEngine) -> str | None:
    """Say what keeps a recording from being one of an engine's columns; None: nothing does."""
    about = json.loads(json.dumps(describe_columns(engine, engine.columns)))
    recorded = [column["about"] for column in recording["stage"]["columns"]]
    if about != recorded:
        names = [[one["name"] for one in each] for each in (recorded, about)]
        return f"it is of the columns {names[0]}, described as they were then, and the page's are {names[1]}"
    for name, digest in _digests(engine, engine.columns).items():
        if recording["weights"].get(name) != digest:
            return f"it is of other weights of {name}"
    return None


def record(engine: CompareEngine, prompt: str = PROMPT, max_new_tokens: int = 96) -> dict[str, Any]:
    """Answer a prompt greedily with every column, and keep all that the page shows of it.

    Raises:
        ValueError: the prompt is empty or too long.
        MiniLoraError: a column failed.
    """
    sampling = Sampling(max_new_tokens)
    for _ in engine.stream(prompt, Sampling(4)):
        pass  # what is slower the first time is not what a visitor waits for
    comparison = Comparison(0, describe_columns(engine, engine.columns), prompt, sampling, engine.token_text)
    before = engine.forwards
    for update in engine.stream(prompt, sampling):
        if update.error:
            raise MiniLoraError(f"{engine.columns[update.row].name} cannot be recorded: {update.error}")
        comparison.add(update)
    comparison.forwards = engine.forwards - before
    frame = comparison.frame(finished=True)
    today, machine = datetime.now(UTC).date(), _machine()
    label = f"recorded {_spoken(today)} on {machine}"
    return {
        "command": COMMAND,
        "date": today.isoformat(),
        "machine": machine,
        "weights": _digests(engine, engine.columns),
        "status": {**frame.status, "phase": "replay", "words": "Replay of a recorded run."},
        "stage": {**frame.stage, "replay": label},
    }


def _digests(engine: CompareEngine, columns: Sequence[Column]) -> dict[str, str]:
    folders = {entry.name: entry.folder for entry in engine.bank.list()}
    return {c.adapter: file_sha256(folders[c.adapter] / WEIGHTS) for c in columns if c.adapter is not None}


def _read(path: Path) -> dict[str, Any]:
    try:
        recording = json.loads(path.read_text(encoding="utf-8"))
        if all(name in recording for name in ("stage", "status", "weights")):
            return recording
    except (OSError, ValueError, TypeError) as error:
        raise MiniLoraError(f"{str(path)!r} cannot be read as a recording: {error}") from error
    raise MiniLoraError(f"{str(path)!r}: must be a recording made with {COMMAND}")


def _machine() -> str:
    """Name the processor, and how many threads computed."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    cpus = Path("/proc/cpuinfo")
    if not name and cpus.is_file():
        lines = cpus.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    name = name or platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return name if torch.cuda.is_available() else f"{name}, {threads} {'thread' if threads == 1 else 'threads'}"


def _spoken(day: date) -> str:
    return f"{day.day} {day:%B %Y}"


def main() -> None:
    """Record, and write the file."""
    from minilora_hub.compare.found_adapters import shipped_adapters

    parser = argparse.ArgumentParser(prog=COMMAND, description="Record the comparison that the page opens with.")
    parser.add_argument("--base", default="embedded", help='the base; default: "embedded"')
    parser.add_argument("--adapter", action="append", help="folder or id; may be given again; default: those shipped")
    parser.add_argument("--prompt", default=PROMPT, help="what to answer")
    parser.add_argument("--tokens", type=int, default=96, help="the most tokens of an answer; default: 96")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="the file; default: the one that is shipped")
    told = parser.parse_args()
    engine = CompareEngine(told.base, told.adapter or shipped_adapters(), progress=print)
    recording = record(engine, told.prompt, told.tokens)
    told.out.write_text(json.dumps(recording, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{recording['status']['badge']}; written to {told.out}")


if __name__ == "__main__":
    main()
