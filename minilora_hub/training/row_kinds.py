"""The kinds of rows, and which of them a run has."""

from __future__ import annotations

from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.training import generated_texts, labelled_rows, picture_rows
from minilora_hub.training.generated_texts import GeneratedTexts
from minilora_hub.training.labelled import LabelledRows
from minilora_hub.training.pictures import PictureRows
from minilora_hub.training.row_kind import RowKind
from minilora_hub.training.settings import TrainingSettings
from minilora_hub.training.sources import read_values

KINDS: dict[str, type[RowKind]] = {
    generated_texts.TASK: GeneratedTexts,
    labelled_rows.TEXTS: LabelledRows,
    labelled_rows.WORDS: LabelledRows,
    picture_rows.TASK: PictureRows,
}
"""Task -> the kind of its rows."""


def kind_of(settings: TrainingSettings, base: ResolvedBase) -> RowKind:
    """Return the kind of a run's rows: that of the task that is given, or else of the first row's fields."""
    task = settings.task or (generated_texts.TASK if settings.from_votes else _task_of_rows(settings))
    return KINDS[task](task, settings, base)


def _task_of_rows(settings: TrainingSettings) -> str:
    _, first = next(read_values(settings.data, settings.data_split, settings.data_revision))
    if not isinstance(first, dict):  # an invalid row, which is reported later
        return generated_texts.TASK
    if picture_rows.has_pictures(first):
        return picture_rows.TASK
    return labelled_rows.task_of(first) or generated_texts.TASK
