"""The results of a run: the answers, scores and routing of each model that was measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.evaluation.generation import RoutingSums
from minilora_hub.evaluation.perplexity import GeneralText
from minilora_hub.evaluation.settings import Adapter, Settings
from minilora_hub.evaluation.tasks.items import Item, Task


@dataclass(frozen=True)
class TaskScores:
    """The answers of one model to one task, item by item.

    Attributes:
        answers: the texts, stripped.
        exact: 1 where the answer is the reference, else 0.
        f1: JSON field F1; None for a task without JSON.
    """

    answers: tuple[str, ...]
    exact: tuple[float, ...]
    f1: tuple[float, ...] | None


@dataclass(frozen=True)
class Model:
    """One measured model.

    Attributes:
        adapter: None for the bare base.
        few_shot: number of examples before each question.
        scores: key of the items -> its answers.
        routing: key of the items -> its routing, for a MixLoRA.
        nll: for each window of general text, the sum of -ln p (nats); None where it was not measured.
    """

    adapter: Adapter | None
    few_shot: int = 0
    scores: dict[str, TaskScores] = field(default_factory=dict)
    routing: dict[str, RoutingSums] = field(default_factory=dict)
    nll: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """Its name in tables."""
        if self.adapter is not None:
            return self.adapter.name
        return f"base, {self.few_shot} examples" if self.few_shot else "base"


@dataclass(frozen=True)
class Report:
    """Everything that a run has measured.

    Attributes:
        settings: the settings of the run.
        base: the base.
        fingerprint: of its weights.
        base_parameters: their number.
        tasks: name -> task.
        items: the items, in the order of the scores, by task, and those of the held-out format by `held_out_key`.
        limits: key of the items -> the most tokens of an answer.
        models: the base, the base with examples if there are any, then each adapter.
        text: the general text, and the number of predicted tokens of each window; None where it was not measured.
        seconds: wall time.
        computed: number of rows that were computed; the others were cached.
    """

    settings: Settings
    base: ResolvedBase
    fingerprint: str
    base_parameters: int
    tasks: dict[str, Task]
    items: dict[str, tuple[Item, ...]]
    limits: dict[str, int]
    models: tuple[Model, ...]
    text: tuple[GeneralText, tuple[int, ...]] | None
    seconds: float
    computed: int
