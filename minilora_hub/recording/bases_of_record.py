"""Find the base that an adapter is recorded on, and the name under which it is published."""

from __future__ import annotations

import re
from dataclasses import dataclass

from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.folders import read_json
from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.adapter_folder.names import COMPANIONS, PEFT_CONFIG
from minilora_hub.bases.embedded import HUB_ID
from minilora_hub.bases.resolving import EMBEDDED, ResolvedBase, resolve_base
from minilora_hub.errors import AdapterError

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
LARGE = 8e9
"""Bytes of base weights up to which logits are computed in float32, whatever the dtype of the checkpoint."""


def published_base(source: Source, base_id: str | None) -> tuple[str, str | None]:
    """Return the Hub id and the revision of the base that the published configuration names.

    Args:
        source: the adapter.
        base_id: the id to publish; default: the one the adapter names. An alias is replaced by its id.

    Raises:
        AdapterError: the adapter names no base, or a folder.
    """
    named = base_id or source.base
    if named == EMBEDDED:
        return HUB_ID, None
    if not named:
        raise AdapterError("base_model_name_or_path is missing: say which base it is for, base_id= (--base-id)")
    if not HUB_NAME.fullmatch(named):
        raise AdapterError(
            f"base {named!r} is a folder of this machine: "
            "pass the id of the same weights on the Hub, base_id= (--base-id)"
        )
    return named, source.base_revision if named == source.base else None


@dataclass(frozen=True)
class BaseOfRecord:
    """The base of an adapter that is published.

    Attributes:
        id: its id on the Hub, as the published configuration names it.
        revision: its commit there; None where it is not known.
        found: the base on this machine.
    """

    id: str
    revision: str | None
    found: ResolvedBase

    @property
    def elsewhere(self) -> str | None:
        """Where it is loaded from, where that is not `id` on the Hub."""
        from_hub = self.found.hub_id == self.id and not self.found.embedded
        return None if from_hub else str(self.found.path)


def find_base_of_record(
    source: Source, base_id: str | None, base_model: str | None, token: str | None, progress: bool
) -> BaseOfRecord:
    """Find the base that an adapter was trained on, and fetch it if it is not on this machine yet.

    Args:
        source: the adapter.
        base_id: the id to publish; default: the one the adapter names.
        base_model: another place to load it from: ``"embedded"``, a folder or an id.
        token: for private and gated bases.
        progress: show bars while it is fetched.

    Raises:
        AdapterError: the adapter names no base, or a folder.
        BaseModelError: it cannot be found.
    """
    published, revision = published_base(source, base_id)
    name, at = source.named_base(base_model)
    return BaseOfRecord(
        published, revision, resolve_base(name or published, revision=at, token=token, progress=progress)
    )


def require_trained_on(source: Source, base: BaseOfRecord, fingerprint: str) -> None:
    """Refuse a base with other weights than the adapter was trained on, as far as both fingerprints are known.

    Raises:
        AdapterError: the weights are others.
    """
    from minilora_hub.remote_code.adapter_files import UNKNOWN

    found, trained_on = base.found, source.base_fingerprint
    if UNKNOWN not in (trained_on, fingerprint) and trained_on != fingerprint:
        hint = f', e.g. "{EMBEDDED}"' if base.id == HUB_ID and not found.embedded else ""
        raise AdapterError(
            f"base {found.name!r} has fingerprint {fingerprint}, but the adapter was trained on {trained_on}: "
            f"pass the base it was trained on, base_model= (--base){hint}"
        )


def revision_of_record(source: Source, base: BaseOfRecord, fingerprint: str) -> str | None:
    """Return the base's commit on the Hub, as the published configuration names it; None where it is not known."""
    from minilora_hub.remote_code.adapter_files import UNKNOWN

    if base.revision is not None or base.found.hub_id != base.id or fingerprint == UNKNOWN:
        return base.revision
    # It was trained on these weights, and this commit has them.
    return base.found.revision if source.base_fingerprint == fingerprint else None


def wanted_dtype(found: ResolvedBase) -> str:
    """Return the dtype in which logits are computed: ``"float32"``, or ``"auto"`` for the checkpoint's own."""
    size = sum(path.stat().st_size for path in found.path.glob("*.safetensors"))
    return "float32" if size <= LARGE else "auto"


def base_inputs(base: ResolvedBase, fingerprint: str) -> dict[str, str]:
    """Return what a base's answers depend on: its fingerprint, and hashes of its JSON files except the tokenizer."""
    beside = (path for path in sorted(base.path.glob("*.json")) if path.name not in COMPANIONS)
    return {"base/fingerprint": fingerprint} | {f"base/{path.name}": file_sha256(path) for path in beside}


def why_not_reproducible(base: ResolvedBase, fingerprint: str) -> str | None:
    """Return why stored results of a base must not be reused, although its files are the same; None if they may be."""
    if not fingerprint.startswith("sha256:"):
        return "the base's weights have no fingerprint"
    if (base.path / PEFT_CONFIG).is_file():
        return "the base has an adapter of its own"
    settings = read_json(base.path / "config.json").get("quantization_config") or {}
    method = settings.get("quant_method", "bitsandbytes") if isinstance(settings, dict) else "unknown"
    return None if method == "bitsandbytes" else f"the base is quantised ({method})"
