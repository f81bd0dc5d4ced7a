"""`recording.json`: reference logits of an adapter, stored in its folder so that a push does not have to load the base.

The file is not published; the published `verification.json` is made from it. A recording is valid as long as its key is
unchanged: the hashes of the adapter's weights and configuration and of the published code, the fingerprint of the base,
the dtype, and the versions of torch and transformers. Otherwise the logits are recorded again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any, ClassVar

from pydantic import Field

from minilora_hub.adapter_folder.code import remote_code_hash
from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.adapter_folder.names import OUR_CONFIG, PEFT_CONFIG, WEIGHTS
from minilora_hub.adapter_folder.verification import Prompt
from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.documents import Document, need
from minilora_hub.recording.logits import TOLERANCES
from minilora_hub.recording.recorded_base import wanted_dtype

RECORDING_FILE = "recording.json"


def _hash_fields(fields: Mapping[str, Any]) -> str:
    content = {name: value for name, value in fields.items() if name not in ("sha256", "schema_version")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()


OF_THE_OTHERS = need("must be the hash of the other fields", lambda digest, fields: digest == _hash_fields(fields))

KNOWN_DTYPE = need(f"must be one of {tuple(TOLERANCES)}", lambda dtype, _: dtype in TOLERANCES)


@dataclass(frozen=True)
class Recording(Document):
    """Reference logits, and facts that are only known while the base is loaded.

    Attributes:
        key: everything that the recording depends on; see `recording_key`.
        prompts, top_tokens, top_logits: as in `Verification`.
        dtype: in which they were computed, e.g. ``"float32"``.
        base_parameters: number of parameters of the base.
        parameters: number of parameters of the adapter.
        layers_path: path of the base's layers in its model; None in PEFT's layout.
        peft_targets: of a DoRA: PEFT's names for the linears that it adapts.
        peft_fan_in_fan_out: of a DoRA: whether those store their weights transposed.
        peft_problem: of a DoRA: why PEFT cannot read it; None if it computes the same there.
        note: a note for the author on the inputs.
        sha256: hash of the fields above, which detects a damaged file.
    """

    FILE: ClassVar[str] = RECORDING_FILE
    VERSION: ClassVar[int] = 3

    key: dict[str, str]
    prompts: tuple[Prompt, ...]
    top_tokens: tuple[tuple[int, ...], ...]
    top_logits: tuple[tuple[float, ...], ...]
    dtype: Annotated[str, KNOWN_DTYPE]
    base_parameters: int
    parameters: int
    layers_path: str | None = None
    peft_targets: tuple[str, ...] = ()
    peft_fan_in_fan_out: bool = False
    peft_problem: str | None = None
    note: str | None = None
    sha256: Annotated[str, Field(validate_default=True), OF_THE_OTHERS] = ""
    schema_version: int = VERSION

    def sealed(self) -> Recording:
        """Return it with the hash of its fields."""
        return dataclasses.replace(self, sha256=_hash_fields(dataclasses.asdict(self)))


def recording_key(source: Source, base: ResolvedBase, fingerprint: str) -> dict[str, str]:
    """Return everything that a recording depends on; it is reused only while all of it stays the same."""
    return {
        "weights": file_sha256(source.folder / WEIGHTS),
        "configuration": file_sha256(source.folder / configuration_file(source)),
        "published code": remote_code_hash(),
        "base": fingerprint,
        "dtype": wanted_dtype(base),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def configuration_file(source: Source) -> str:
    """Return the name of an adapter's configuration file."""
    return OUR_CONFIG if source.layout == "auto" else PEFT_CONFIG
