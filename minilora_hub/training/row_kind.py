"""What a run needs to know of the rows that it trains on: one class for each kind of rows.

A kind checks the settings, loads what makes tokens, reads the rows, says which model learns from them, makes batches
and the trainer. The run itself (`run.py`, `loop.py`, `plan.py`) knows none of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.errors import TrainingError
from minilora_hub.training.dataset import TrainingData
from minilora_hub.training.settings import TrainingSettings

METHODS = ("dora", "mixlora", "mixdora")
"""Methods for rows that are not of texts to generate."""


class RowKind(ABC):
    """A kind of rows, in one run.

    Args:
        task: what the rows are for, by the Hub's name.
        settings: of the run.
        base: the base.

    Attributes:
        auto_class: name of the Auto class of the base's models.
        model_arguments: arguments for the base's from_pretrained; known once the rows were read.
        processor: what makes the model's inputs, and is saved beside the adapter: a tokenizer, or a processor with one.
        ends: ids of the tokens that end an answer; none where no text is generated.
        forward_arguments: arguments of the model's forward in training, beside the batch.
    """

    auto_class: str
    processor: Any
    forward_arguments: Mapping[str, Any] = {}

    def __init__(self, task: str, settings: TrainingSettings, base: ResolvedBase) -> None:
        self.task, self.settings, self.base = task, settings, base
        self.ends: list[int] = []
        self.model_arguments: dict[str, Any] = {}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with a padding token."""
        return getattr(self.processor, "tokenizer", self.processor)

    @abstractmethod
    def prepare(self, folder: Path, begun: datetime) -> TrainingData:
        """Read, check and tokenize the rows, and split off the validation rows.

        Args:
            folder: for the files of tokens; it must exist as long as they are used.
            begun: when the run began, for chat templates that write the date.

        Raises:
            DataError: a row cannot be used and bad rows are not skipped; the message names file and line.
        """

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch of rows, as they are in the file of tokens."""

    @abstractmethod
    def make_trainer(self, arguments: Any, **given: Any) -> Any:
        """Return the trainer; `arguments` is an SFTConfig, `given` what every trainer of adapters takes."""

    def notes(self) -> tuple[str, ...]:
        """Return notes for the user on the saved adapter."""
        return ()

    def require(self, **needs: tuple[bool, str]) -> None:
        """Check the settings that only rows of texts to generate may have, and further ones.

        Args:
            **needs: by the setting's name, whether it is possible here, and what is required.

        Raises:
            TrainingError: one is not; the message names it.
        """
        settings, recipe = self.settings, self.settings.recipe
        other = "leave it out"
        usual = {
            "method": (settings.method in METHODS, f"must be one of {', '.join(METHODS)}"),
            "from_adapter": (not settings.from_adapter, other),
            "objective": (not settings.objective, other),
            "budget": (recipe.budget is None, other),
            "init": (recipe.init == "zero", other),
            "batching": (recipe.batching != "packed", "must be shuffled or length-grouped"),
            "shard": (not recipe.shard, other),
        }
        for name, (holds, need) in (usual | needs).items():
            if not holds:
                value = getattr(settings if hasattr(settings, name) else recipe, name)
                raise TrainingError(f"{name}={value!r} on rows for {self.task}: {need} (--task names other rows)")
