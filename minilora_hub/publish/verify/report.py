"""The report of a verification: its checks in order, each with its details."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Step:
    """One check: its name, whether it passed, and details."""

    name: str
    ok: bool
    detail: str


@dataclass
class VerifyReport:
    """Report of `verify`.

    Attributes:
        name: the repo or the folder.
        revision: the commit; None for a folder.
        steps: the checks, in order. `verify` may stop at the first failure.
        code: hash of the repo's code files; None where it has none.
        difference: the largest difference of a logit from the recorded one; None where none was computed.
    """

    name: str
    revision: str | None
    steps: list[Step] = field(default_factory=list)
    code: str | None = None
    difference: float | None = None

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return bool(self.steps) and all(step.ok for step in self.steps)

    @property
    def problem(self) -> str | None:
        """The first failed check, in one line."""
        return next((f"{step.name}: {step.detail}" for step in self.steps if not step.ok), None)

    def add(self, name: str, ok: bool, detail: str) -> bool:
        """Add a step, and return whether it passed."""
        self.steps.append(Step(name, ok, " ".join(detail.split())))
        return ok

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serializable dictionary."""
        return asdict(self) | {"ok": self.ok}
