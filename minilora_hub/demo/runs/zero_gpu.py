"""Run each comparison as one ZeroGPU call, which allocates a GPU. Not run on ZeroGPU so far.

The models are moved to "cuda" when the app starts, before a GPU is present. Each call runs in a forked process that has
the GPU and everything that was loaded before the page was served. Therefore no adapter can be loaded later, calls use
no threads, and arguments and results must be picklable. Outside ZeroGPU the page does not use `spaces.GPU`.

`spaces` must be imported before torch initializes CUDA, so app.py imports this module first. If the package is missing,
the folder spaces/ of this repo is found as a namespace package, so the code checks for the attribute `spaces.GPU`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilora_hub.compare.engine import Row, Step
    from minilora_hub.compare.prompt_index import Choice

    Compute = Callable[[list[Row], list[str] | None], Generator[Choice | Step]]

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # `spaces` may import gradio

try:
    import spaces
except ImportError:
    GPU: Any = None
else:
    GPU = getattr(spaces, "GPU", None)

# A call requests the GPU for a duration; a shorter request waits less. Estimates, not measured on ZeroGPU.
START_SECONDS = 10.0
STEP_SECONDS = 0.04
ROW_SECONDS = 0.005
LONGEST_SECONDS = 120


def is_zero_gpu() -> bool:
    """Return whether this is a Space on ZeroGPU."""
    return GPU is not None and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def gpu_seconds(rows: Sequence[Row], among: Sequence[str] | None = None) -> int:
    """Estimate the GPU seconds to request: the steps of the longest answer, each slower with every additional row.

    `START_SECONDS` covers the forward that chooses one of the adapters `among`.
    """
    steps = max(row.sampling.max_new_tokens for row in rows)
    return min(LONGEST_SECONDS, math.ceil(START_SECONDS + steps * (STEP_SECONDS + ROW_SECONDS * len(rows))))


def remote_steps(compute: Compute) -> Compute:
    """Return a function that answers rows in a ZeroGPU call, step by step; closing its iterator ends the call.

    Args:
        compute: answers the rows in the call's process, see `Runner.steps`.

    Raises:
        RuntimeError: the package `spaces` is missing.
    """
    if GPU is None:
        raise RuntimeError("the package spaces, which ZeroGPU provides, is not installed")

    def call(rows: list[Row], among: list[str] | None) -> Generator[Choice | Step]:
        yield from compute(rows, among)

    decorated: Compute = GPU(duration=gpu_seconds)(call)
    return decorated
