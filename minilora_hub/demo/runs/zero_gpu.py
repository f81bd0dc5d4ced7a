"""Computing on ZeroGPU: each comparison is one call of its own, for which a GPU is lent. Not run on ZeroGPU so far.

There the models are put onto "cuda" when the app starts, where no GPU is yet; a call is forked off, gets the GPU, and
knows what was loaded before the page was served. Hence: nothing is loaded later, no thread is needed by a call, and
what goes in and out can be pickled. Everywhere else `spaces.GPU` does nothing, and the page does not use it.

`spaces` must be imported before torch touches CUDA: app.py imports this module first. Where the package is missing, the
folder spaces/ of this repo is found as a namespace package, so `spaces.GPU` is what tells.
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
"""Forwards of the base, and what they changed."""

# A request is lent the GPU for as long as it asks; asking for less comes sooner. Estimates, not measured there.
START_SECONDS = 10.0
STEP_SECONDS = 0.04
ROW_SECONDS = 0.005
LONGEST_SECONDS = 120


def is_zero_gpu() -> bool:
    """Whether this is a Space on ZeroGPU."""
    return GPU is not None and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def gpu_seconds(rows: Sequence[Row]) -> int:
    """For how long the GPU is asked: as many steps as the longest answer may have, each dearer with every row."""
    steps = max(row.sampling.max_new_tokens for row in rows)
    return min(LONGEST_SECONDS, math.ceil(START_SECONDS + steps * (STEP_SECONDS + ROW_SECONDS * len(rows))))


def on_gpu(compute: Callable[[list[Row]], Generator[Step]]) -> Callable[[list[Row]], Generator[Step]]:
    """Make each call of a generator function a call on ZeroGPU.

    Raises:
        RuntimeError: there is no `spaces.GPU`.
    """
    if GPU is None:
        raise RuntimeError("the package spaces, which ZeroGPU brings, is not there")
    decorated: Callable[[list[Row]], Generator[Step]] = GPU(duration=gpu_seconds)(compute)
    return decorated


def remote_steps(engine: CompareEngine) -> Callable[[list[Row]], Generator[Step]]:
    """Return what answers rows in a call of its own, step by step; closing it ends the call within one step."""

    def compute(rows: list[Row]) -> Generator[Step]:
        yield from counted(engine, engine.stream_steps(rows))

    return on_gpu(compute)


def counted(engine: CompareEngine, steps: Generator[list[Update]]) -> Generator[Step]:
    """Add to each step the forwards of the base that it took, also where others compute in between."""
    with closing(steps):
        while True:
            before = engine.forwards
            updates = next(steps, None)
            if updates is None:
                return
            yield engine.forwards - before, updates
