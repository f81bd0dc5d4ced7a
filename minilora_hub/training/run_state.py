"""What a run writes down about itself, so that it can be resumed, and only with the data it started with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from minilora_hub.documents import write_whole
from minilora_hub.errors import TrainingError

STATE_FILE = "run.json"


@dataclass(frozen=True)
class RunState:
    """A run so far.

    Attributes:
        data_sha256: hash of its tokens and labels.
        seconds: training time up to the last checkpoint.
        finished: whether the result is written.
        begun: when it began, in ISO format: the date that a chat template writes, also after a resume on another day.
    """

    data_sha256: str
    seconds: float = 0.0
    finished: bool = False
    begun: str | None = None

    def save(self, out: Path) -> None:
        """Write ``run.json``, whole or not at all."""
        write_whole(out / STATE_FILE, json.dumps(asdict(self), indent=2) + "\n")

    def after(self, seconds: float, finished: bool = False) -> RunState:
        """The state some seconds later."""
        return replace(self, seconds=round(self.seconds + seconds, 2), finished=finished)


def read_state(out: Path) -> RunState | None:
    """The state of the run in a folder, None where there is none.

    Raises:
        TrainingError: the file is damaged.
    """
    file = out / STATE_FILE
    if not file.is_file():
        return None
    try:
        return RunState(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise TrainingError(
            f"{STATE_FILE} in {out.name!r} cannot be read ({error}): start anew in another --out"
        ) from error
