"""The replay that the page opens with: a recorded comparison, labelled with its date and machine. No Gradio.

A replay is only shown on a page with the weights that it was recorded with. After a shipped adapter has changed, record
it again::

    python -m minilora_hub.demo.runs.replay
    python -m minilora_hub.demo.runs.replay --base org/model --adapter me/poet --prompt "…" --out mine.json

With ``MINILORA_REPLAY=mine.json`` a page opens with that replay instead of the shipped one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.compare.engine import CompareEngine, Sampling
from minilora_hub.demo.adapters.catalogue import Catalogue
from minilora_hub.demo.adapters.columns import describe_columns
from minilora_hub.demo.runs.examples import EXAMPLES, expected_answers
from minilora_hub.demo.ui.page_state import RunningComparison
from minilora_hub.errors import MiniLoraError

SHIPPED = Path(__file__).parent / "replay.json"
COMMAND = "python -m minilora_hub.demo.runs.replay"


def find_replay(engine: CompareEngine) -> dict[str, Any] | None:
    """Return the replay for the models of a page, or None if the shipped one was recorded with other models.

    Raises:
        MiniLoraError: ``MINILORA_REPLAY`` names a file that is not a replay, or was recorded with other models.
    """
    named = os.environ.get("MINILORA_REPLAY")
    replay = _read(Path(named) if named else SHIPPED)
    differs = difference(replay, engine)
    if differs is None:
        return replay
    if named:
        raise MiniLoraError(f"MINILORA_REPLAY={named!r}: {differs}; make it again with {COMMAND}")
    return None


def difference(replay: dict[str, Any], engine: CompareEngine) -> str | None:
    """Return how a replay differs from an engine's columns and weights; None if it does not."""
    about = json.loads(json.dumps(describe_columns(Catalogue(engine), engine.columns)))
    replayed = [column["about"] for column in replay["stage"]["columns"]]
    if about != replayed:
        names = [[one["name"] for one in each] for each in (replayed, about)]
        return f"it was recorded with the columns {names[0]}, and the page has {names[1]}"
    for name, digest in _digests(engine).items():
        if replay["weights"].get(name) != digest:
            return f"it was recorded with other weights of {name}"
    return None


def make_replay(
    engine: CompareEngine, prompt: str = EXAMPLES[0].prompt, max_new_tokens: int = 96, expected: str | None = None
) -> dict[str, Any]:
    """Answer a prompt greedily with every column, and return the content of a replay file.

    Raises:
        ValueError: the prompt is empty or too long.
        MiniLoraError: a column failed.
    """
    sampling = Sampling(max_new_tokens)
    for _ in engine.stream(prompt, Sampling(4)):
        pass  # warm up, so that one-time costs are not part of the recorded times
    about = describe_columns(Catalogue(engine), engine.columns)
    running = RunningComparison(0, about, prompt, sampling, engine.token_text, expected)
    before = engine.forwards
    for update in engine.stream(prompt, sampling):
        if update.error:
            raise MiniLoraError(f"the replay cannot be made: {engine.columns[update.row].name}: {update.error}")
        running.add(update)
    running.forwards = engine.forwards - before
    frame = running.frame(finished=True)
    today, machine = datetime.now(UTC).date(), _machine()
    return {
        "command": COMMAND,
        "date": today.isoformat(),
        "machine": machine,
        "weights": _digests(engine),
        "status": {**frame.status, "phase": "replay", "words": "Replay of a recorded run."},
        "stage": {**frame.stage, "replay": f"recorded {today.day} {today:%B %Y} on {machine}"},
    }


def _digests(engine: CompareEngine) -> dict[str, str]:
    folders = {entry.name: entry.folder for entry in engine.bank.list()}
    return {column.name: file_sha256(folders[column.name] / WEIGHTS) for column in engine.columns[1:]}


def _read(path: Path) -> dict[str, Any]:
    try:
        replay = json.loads(path.read_text(encoding="utf-8"))
        if all(name in replay for name in ("stage", "status", "weights")):
            return replay
    except (OSError, ValueError, TypeError) as error:
        raise MiniLoraError(f"{str(path)!r} cannot be read as a replay: {error}") from error
    raise MiniLoraError(f"{str(path)!r}: must be a replay made with {COMMAND}")


def _machine() -> str:
    """Return the name of the GPU, or of the processor and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name, cpus = "", Path("/proc/cpuinfo")
    if cpus.is_file():
        lines = cpus.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    threads = torch.get_num_threads()
    return f"{name or platform.processor() or platform.machine()}, {threads} thread{'' if threads == 1 else 's'}"


def main() -> None:
    """Record a replay, and write the file."""
    from minilora_hub.compare.found_adapters import shipped_adapters

    parser = argparse.ArgumentParser(prog=COMMAND, description="Record the replay that the page opens with.")
    parser.add_argument("--base", default="embedded", help='the base; default: "embedded"')
    parser.add_argument(
        "--adapter", action="append", help="folder or id; may be repeated; default: the shipped adapters"
    )
    parser.add_argument("--prompt", default=EXAMPLES[0].prompt, help="the prompt")
    parser.add_argument("--expected", help="the right answer; default: that of the prompt, if it is an example")
    parser.add_argument("--tokens", type=int, default=96, help="maximum tokens of an answer; default: 96")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="output file; default: the shipped replay")
    arguments = parser.parse_args()
    engine = CompareEngine(arguments.base, arguments.adapter or shipped_adapters(), progress=print)
    expected = arguments.expected or expected_answers(EXAMPLES).get(arguments.prompt)
    replay = make_replay(engine, arguments.prompt, arguments.tokens, expected)
    arguments.out.write_text(json.dumps(replay, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{replay['status']['badge']}; written to {arguments.out}")


if __name__ == "__main__":
    main()
