"""The schema of `verification.json`: what a copy of the adapter must compute, and the hashes of its files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from minilora_hub.adapter_folder.names import EDITED_ON_THE_HUB, TOKENIZING
from minilora_hub.documents import Document, need

VERIFICATION_FILE = "verification.json"
LOADED_FOLDERS = ("", "peft", "additional_chat_templates", "custom_generate")
LOADED_ENDINGS = (".json", ".jinja", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".model")
TOP_LOGITS = 32
Positive = Annotated[int, Field(gt=0)]
Number = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Row = Field(min_length=1, max_length=TOP_LOGITS)
PER_PROMPT = need("must have one list per prompt", lambda rows, data: len(rows) == len(data.get("prompts", rows)))
PER_VALUE = need(
    "must be one number, or as many as the shape has",
    lambda values, data: values is None or len(values) in (1, prod(data.get("shape", values))),
)
STEP_OR_VALUES = need(
    "must be null beside values, and only there",
    lambda step, data: "values" not in data or (step is None) != (data["values"] is None),
)
PER_TOKEN = need(
    "must have one number for each of top_tokens",
    lambda rows, data: [*map(len, rows)] == [*map(len, data.get("top_tokens", rows))],
)


@dataclass(frozen=True)
class InputTensor:
    """A tensor that a model is given: whole numbers, or values of an image or a sound, which follow from a rule.

    Attributes:
        shape: its shape.
        values: its whole numbers in order, or one number that all of them are.
        step: or else value i is ``i · step mod 101 / 50 - 1``.
    """

    shape: Annotated[tuple[Positive, ...], need("must hold at most 2 ** 26 values", lambda s, _: prod(s) <= 2**26)]
    values: Annotated[tuple[Number, ...] | None, PER_VALUE] = None
    step: Annotated[Positive | None, STEP_OR_VALUES, Field(validate_default=True)] = None


Prompt = Annotated[
    Annotated[tuple[int, ...], Field(min_length=1), Tag("ids")] | Annotated[dict[str, InputTensor], Tag("tensors")],
    Discriminator(lambda prompt: "tensors" if isinstance(prompt, dict) else "ids"),
]
"""Token ids, or {argument of the model's forward: tensor}."""


def plain_prompts(prompts: Iterable[Prompt]) -> list[Any]:
    """Return prompts as JSON has them."""
    return [{k: asdict(v) for k, v in prompt.items()} if isinstance(prompt, dict) else prompt for prompt in prompts]


@dataclass(frozen=True)
class Verification(Document):
    """What a model built from the repo's files must compute, and what those files are.

    Attributes:
        prompts: token ids, a list a prompt; or the tensors that a model is given that sees or hears.
        top_tokens: per prompt, the tokens with the 32 largest logits at the last position, the largest first; of other
            heads the places in what `recording.model_outputs.recorded_row` returns.
        top_logits: their logits.
        tolerance: by how much a logit may differ.
        sha256: path in the repo -> hex digest: the weights, every code file, and whatever else loading reads.
        libraries: package -> version, of the process that recorded this.
        base_fingerprint: of the base it was recorded on.
        dtype: in which the logits were computed, e.g. ``"float32"``.
    """

    FILE: ClassVar[str] = VERIFICATION_FILE
    VERSION: ClassVar[int] = 2

    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1)]
    top_tokens: Annotated[tuple[Annotated[tuple[int, ...], Row], ...], PER_PROMPT]
    top_logits: Annotated[tuple[Annotated[tuple[float, ...], Row], ...], PER_TOKEN]
    tolerance: Annotated[float, Field(gt=0)]
    sha256: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]
    base_fingerprint: str
    dtype: str
    libraries: dict[str, str] = field(default_factory=dict)
    schema_version: int = VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return what the file holds, as version 1, which has token ids only, where it can be."""
        tensors = any(isinstance(prompt, dict) for prompt in self.prompts)
        return super().to_dict() | {"schema_version": 2 if tensors else 1}


def is_hashed(path: str) -> bool:
    """Whether verification.json holds the hash of a published file.

    People edit the card, the licence and the measured results on the Hub; a file cannot hold its own hash.
    """
    return path != VERIFICATION_FILE and not any(fnmatchcase(path, pattern) for pattern in EDITED_ON_THE_HUB)


def is_loaded(path: str) -> bool:
    """Whether a library may read a file with a published adapter, by its path: configuration, weights or code."""
    folder, _, name = path.rpartition("/")
    by_name = name.endswith(LOADED_ENDINGS) or name in (*TOKENIZING, "requirements.txt")
    return name.endswith(".py") or (by_name and folder in LOADED_FOLDERS)
