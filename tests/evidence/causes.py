"""What may keep a MixLoRA's routers flat, and how long the runs are: the plan behind `routers.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from evidence.plan import ADAPTERS
from evidence.store import RESULTS

FOLDER = RESULTS / "routers"


@dataclass(frozen=True)
class Cause:
    """One thing that may keep routers flat.

    Attributes:
        title: for the table.
        changed: settings of the run that differ from the baseline's.
        kind: how its adapter is made: see `adapter_of`.
    """

    title: str
    changed: dict[str, Any] = field(default_factory=dict)
    kind: str = "trained"


def mixture_in(layers: Sequence[int]) -> dict[str, Any]:
    """Return settings with experts of three times the rank in ten of thirty layers, and LoRA on attention in all."""
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    blocks = [f"layers.{layer}.mlp.{name}" for layer in layers for name in ("gate_proj", "up_proj", "down_proj")]
    return {"target_modules": attention + blocks, "expert_r": 3 * ADAPTERS["mixlora"]["expert_r"]}


CAUSES: dict[str, Cause] = {
    "shipped": Cause("the shipped MixLoRA", kind="shipped"),
    "fresh": Cause("before the first step", kind="fresh"),
    "baseline": Cause("baseline"),
    "ratio-10": Cause("routers learn 10 times as fast", {"router_lr_ratio": 10.0}),
    "balance-0": Cause("no balance loss", {"router_aux_loss_coef": 0.0}),
    "init-0.1": Cause("routers start with preferences", {"router_init_range": 0.1}),
    "apart": Cause("experts start as LoRAs for one task", kind="apart"),
    "apart-ratio-10": Cause("the same, and routers learn 10 times as fast", {"router_lr_ratio": 10.0}, kind="apart"),
    "tasks": Cause("a LoRA for each task, the right one chosen", kind="tasks"),
    "balance-1e-2": Cause("balance loss 0.01 instead of 0.001", {"router_aux_loss_coef": 1e-2}),
    "balance-1e-4": Cause("balance loss 0.0001 instead of 0.001", {"router_aux_loss_coef": 1e-4}),
    "first-third": Cause("experts in the first third of the layers", mixture_in(range(10))),
    "middle-third": Cause("experts in the middle third of the layers", mixture_in(range(10, 20))),
    "last-third": Cause("experts in the last third of the layers", mixture_in(range(20, 30))),
    "mola": Cause("2, 4 and 6 experts in the thirds of the layers", {"num_experts": [2] * 10 + [4] * 10 + [6] * 10}),
}
"""In the order in which they are made."""


@dataclass(frozen=True)
class Sizes:
    """How long a run is, and what it is measured on.

    Attributes:
        steps: optimizer steps.
        rows: of a step.
        items: test items of each task.
        windows: of general text.
    """

    steps: int
    rows: int
    items: int
    windows: int

    def file(self, name: str, seed: int) -> str:
        """The name of a result."""
        return f"{name}-seed{seed}-steps{self.steps}-rows{self.rows}-items{self.items}.json"
