"""The recording beside an adapter: used again where nothing it depends on has changed, made again otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.folders import read_source
from minilora_hub.adapter_folder.results import Verification
from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.code_inputs import changes
from minilora_hub.errors import AdapterError
from minilora_hub.recording.bases_of_record import BaseOfRecord, require_trained_on
from minilora_hub.recording.document import RECORDING_FILE, Recording
from minilora_hub.recording.inputs import Digest, file_digest, inputs_of, weights_stamp, why_unknown
from minilora_hub.recording.reference import make_recording

SHOWN = 3
PUBLISHED = "the folder was published before, and is compared with its record"


@dataclass(frozen=True)
class Obtained:
    """A recording, and where it comes from.

    Attributes:
        recording: what the adapter computes on its base.
        reused: whether it was made before, and the base was not loaded.
        reason: why it was used again, or why it was made.
        gap: how far it is from an earlier verification.json; None where it was not compared with one.
        note: what the author should know; None for nothing.
    """

    recording: Recording
    reused: bool
    reason: str
    gap: float | None = None
    note: str | None = None


def obtain_recording(
    source: Source, base: BaseOfRecord, before: Verification | None = None, digest: Digest = file_digest
) -> Obtained:
    """Return what an adapter computes on its base: as recorded beside it, or else computed now, and kept there.

    A folder that was published before has a verification.json: it is always computed again and compared with that, and
    nothing is written into it.

    Args:
        source: the adapter.
        base: its base.
        before: the folder's verification.json.
        digest: hashes a file.

    Raises:
        AdapterError: the base is not the one it was trained on.
        BaseModelError: the base cannot be loaded.
        ValueError: the weights do not fit the configuration and the base; the message names the tensor.
    """
    from minilora_hub.remote_code.adapter_files import base_fingerprint

    kept, reason, note = _kept(source.folder) if before is None else (None, PUBLISHED, None)
    stamp = weights_stamp(base.found)
    untouched = kept is not None and stamp != "" and stamp == kept.base_stamp
    fingerprint = kept.inputs["base/fingerprint"] if kept and untouched else base_fingerprint(str(base.found.path))
    require_trained_on(source, base, fingerprint)
    inputs = inputs_of(source, base.found, fingerprint, digest)
    if kept is not None:
        why_not = _why_not(kept, inputs, base, fingerprint)
        if why_not is None:
            return Obtained(kept, True, f"nothing that {RECORDING_FILE} depends on has changed")
        reason = why_not
    recording, gap = make_recording(source, base, inputs, stamp, before)
    if before is None:
        try:
            recording.save(source.folder)
        except OSError as error:
            why = error.strerror or type(error).__name__
            note = f"{RECORDING_FILE} cannot be kept in {source.folder.name!r} ({why}): the next push records again"
    return Obtained(recording, False, reason, gap, note)


def keep_recording(folder: str | Path, base: ResolvedBase) -> None:
    """Record what an adapter that was just saved computes on its base, from its files, so that a push need not.

    Raises:
        AdapterError, BaseModelError, ValueError: see `obtain_recording`.
    """
    obtain_recording(read_source(folder), BaseOfRecord(base.hub_id or base.name, base.revision, base))


def _kept(folder: Path) -> tuple[Recording | None, str, str | None]:
    """The recording in a folder if it is whole; else why not, and what the author should know."""
    if not (folder / RECORDING_FILE).is_file():
        return None, f"there was no {RECORDING_FILE}", None
    try:
        return Recording.load(folder), "", None
    except AdapterError as error:
        return None, f"{RECORDING_FILE} cannot be used", f"recorded again: {error}"


def _why_not(kept: Recording, inputs: dict[str, str], base: BaseOfRecord, fingerprint: str) -> str | None:
    """Why a recording is not used again; None where it is."""
    changed = changes(kept.inputs, inputs)
    if changed:
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        return f"changed since it was recorded: {', '.join(changed[:SHOWN])}{more}"
    return why_unknown(base.found, fingerprint)
