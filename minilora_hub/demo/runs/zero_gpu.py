"""ZeroGPU: each comparison is one call, for which a GPU is lent. Not run on ZeroGPU so far.

The models are moved to "cuda" when the app starts, where no GPU is present yet. A call is forked off, gets the GPU,
and has what was loaded before the page was served. So nothing is loaded later, a call needs no thread, and its
arguments and results can be pickled. Everywhere else `spaces.GPU` does nothing, and the page does not use it.

`spaces` must be imported before torch touches CUDA: app.py imports this module first. Where the package is missing, the
folder spaces/ of this repo is found as a namespace package, so the presence of `spaces.GPU` decides.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora_hub.compare.engine import CompareEngine, Row, Update

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # `spaces` may import gradio

try:
    import spaces
except ImportError:
    GPU: Any = None
else:
    GPU = getattr(spaces, "GPU", None)

Step = tuple[int, "list[Update]"]
"""Forwards of the base, and the updates that they gave."""

# The GPU is lent for as long as a call asks; one that asks for less waits less. Estimates, not measured there.
START_SECONDS = 10.0
STEP_SECONDS = 0.04
ROW_SECONDS = 0.005
LONGEST_SECONDS = 120


def is_zero_gpu() -> bool:
    """Return whether this is a Space on ZeroGPU."""
    return GPU is not None and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def gpu_seconds(rows: Sequence[Row]) -> int:
    """Return for how long a call asks for the GPU: the steps of the longest answer, each longer with every row."""
    steps = max(row.sampling.max_new_tokens for row in rows)
    return min(LONGEST_SECONDS, math.ceil(START_SECONDS + steps * (STEP_SECONDS + ROW_SECONDS * len(rows))))


def remote_steps(engine: CompareEngine) -> Callable[[list[Row]], Generator[Step]]:
    """Return a function that answers rows in a ZeroGPU call, step by step; closing its iterator ends the call.

    Raises:
        RuntimeError: the package `spaces` is missing.
    """
    if GPU is None:
        raise RuntimeError("the package spaces, which ZeroGPU brings, is not there")

    def compute(rows: list[Row]) -> Generator[Step]:
        yield from counted(engine, engine.stream_steps(rows))

    decorated: Callable[[list[Row]], Generator[Step]] = GPU(duration=gpu_seconds)(compute)
    return decorated


def counted(engine: CompareEngine, steps: Generator[list[Update]]) -> Generator[Step]:
    """Add to each step its forwards of the base; other comparisons may compute between the steps."""
    with closing(steps):
        while True:
            before = engine.forwards
            updates = next(steps, None)
            if updates is None:
                return
            yield engine.forwards - before, updates
