"""The schema of `recording.json`: what an adapter computes on its base, and everything that depends on.

It lies beside a trained adapter and is never published; `verification.json`, which is, is written from it. Nothing here
loads torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import ClassVar

from minilora_hub.documents import Document, Require

RECORDING_FILE = "recording.json"
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Recording(Document):
    """What was found with the base loaded.

    Attributes:
        inputs: everything it depends on: name -> sha256, version or setting; see `minilora_hub.recording.inputs`.
        base_stamp: sizes, times and places of the base's weights when they were hashed; see `weights_stamp`.
        prompts: token ids, a list a prompt.
        top_tokens: per prompt, the tokens with the 32 largest logits at the last position, the largest first.
        top_logits: their logits.
        dtype: in which they were computed, e.g. ``"float32"``.
        base_parameters: how many the base has.
        parameters: how many the adapter has.
        layers_path: where the base has its layers; None in PEFT's layout.
        tensors: ``{canonical name: shape}`` of what the adapter must hold; None where that is not ours to say, or its
            configuration is of another base.
        peft_targets: of a DoRA: what PEFT calls the linears it sits on.
        peft_fan_in_fan_out: of a DoRA: whether those keep their weights transposed.
        peft_problem: of a DoRA: why PEFT cannot read it; None if it computes the same there.
        sha256: of all of the above, so that a damaged file is known as one.
    """

    FILE: ClassVar[str] = RECORDING_FILE
    VERSION: ClassVar[int] = 1

    inputs: dict[str, str]
    base_stamp: str
    prompts: tuple[tuple[int, ...], ...]
    top_tokens: tuple[tuple[int, ...], ...]
    top_logits: tuple[tuple[float, ...], ...]
    dtype: str
    base_parameters: int
    parameters: int
    layers_path: str | None = None
    tensors: dict[str, tuple[int, ...]] | None = None
    peft_targets: tuple[str, ...] = ()
    peft_fan_in_fan_out: bool = False
    peft_problem: str | None = None
    sha256: str = ""
    schema_version: int = VERSION

    def sealed(self) -> Recording:
        """Return it with its own hash."""
        return dataclasses.replace(self, sha256=self._digest())

    def _digest(self) -> str:
        names = (field.name for field in dataclasses.fields(self) if field.name != "sha256")
        content = {name: getattr(self, name) for name in names}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _check(self, require: Require) -> None:
        require(self.schema_version == self.VERSION, "schema_version", f"must be {self.VERSION}")
        require("base/fingerprint" in self.inputs, "inputs", "with the base's fingerprint")
        require(self.dtype in DTYPES, "dtype", f"one of {DTYPES}")
        require(self.sha256 == self._digest(), "sha256", "the hash of the other fields: the file was changed")
