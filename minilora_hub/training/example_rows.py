"""Examples in an Arrow file: written one at a time, read through a memory map.

Millions of tokens as Python integers need some thirty times the memory of the file. In memory are, for each row, its
place and its numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora_hub.errors import DataError
from minilora_hub.training.tokens import IGNORED, Example

TOKENS_WRITTEN_AT_ONCE, ROWS_READ_AT_ONCE = 50_000, 100
"""How much is Python objects at one time."""


@dataclass(frozen=True)
class ExampleRows:
    """Examples in a file, in their order.

    Attributes:
        dataset: a `datasets.Dataset` with the columns ``input_ids`` and ``labels``.
        places: where each row came from.
        lengths: tokens of each row.
        learned: tokens of each row that have a loss.
    """

    dataset: Any
    places: list[str]
    lengths: list[int]
    learned: list[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        fields = self.dataset[index]
        return Example(self.places[index], fields["input_ids"], fields["labels"])

    def __iter__(self) -> Iterator[Example]:
        places = iter(self.places)
        for columns in self._columns():
            for ids, labels in zip(columns["input_ids"].to_pylist(), columns["labels"].to_pylist(), strict=True):
                yield Example(next(places), ids, labels)

    @property
    def largest_id(self) -> int:
        """The largest token id of all rows; -1 where there are none."""
        from pyarrow import compute

        return max(
            (compute.max(columns["input_ids"].combine_chunks().flatten()).as_py() for columns in self._columns()),
            default=-1,
        )

    def select(self, indices: Sequence[int]) -> ExampleRows:
        """Return the rows at these places, in this order; nothing is copied."""
        return ExampleRows(
            self.dataset.select(indices),
            [self.places[index] for index in indices],
            [self.lengths[index] for index in indices],
            [self.learned[index] for index in indices],
        )

    def place_of(self, ids: list[int]) -> str | None:
        """Return where the row with these ids came from; None if there is none."""
        same_length = (index for index, length in enumerate(self.lengths) if length == len(ids))
        return next((self.places[index] for index in same_length if self[index].input_ids == ids), None)

    def _columns(self) -> Iterator[Any]:
        yield from self.dataset.with_format("arrow").iter(ROWS_READ_AT_ONCE)


class ExampleWriter:
    """Writes examples into an Arrow file, a new one.

    Args:
        path: the file.

    Raises:
        DataError: from every method, where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        ids = pyarrow.list_(pyarrow.int32())
        self._schema = pyarrow.schema([("input_ids", ids), ("labels", ids)])
        self._path, self._waiting, self._tokens = path, list[Example](), 0
        self._places, self._lengths, self._learned = list[str](), list[int](), list[int]()
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # whoever reads an older one keeps it
            self._writer = pyarrow.ipc.new_stream(str(path), self._schema)

    def add(self, example: Example) -> None:
        """Append an example."""
        self._places.append(example.place)
        self._lengths.append(len(example.input_ids))
        self._learned.append(len(example.labels) - example.labels.count(IGNORED))
        self._waiting.append(example)
        self._tokens += len(example.input_ids)
        if self._tokens >= TOKENS_WRITTEN_AT_ONCE:
            self._write()

    def _write(self) -> None:
        import pyarrow

        columns = {name: [getattr(example, name) for example in self._waiting] for name in self._schema.names}
        with self._errors():
            self._writer.write_batch(pyarrow.record_batch(columns, self._schema))
        self._waiting, self._tokens = [], 0

    def finish(self) -> ExampleRows:
        """Close the file, and open it for reading."""
        from datasets import Dataset

        self._write()
        with self._errors():
            self._writer.close()
        return ExampleRows(Dataset.from_file(str(self._path)), self._places, self._lengths, self._learned)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise DataError(
                f"the rows' tokens cannot be kept in {str(self._path.parent)!r} ({reason}): make room, or set TMPDIR"
            ) from error
