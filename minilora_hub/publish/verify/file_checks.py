"""The checks of a published folder's files that run nothing in it.

Whether they are regular files, whether their hashes match, and whether the code is a release of minilora_hub without
references to other code. verification.json comes from the repo itself, so its hashes detect damage, not bad intent.
Unknown code is refused unless the user trusts it; a reference to the code of another repo is always refused.
"""

from __future__ import annotations

from pathlib import Path

from minilora_hub.adapter_folder.code import code_files, code_hash, endpoint_files, release_of
from minilora_hub.adapter_folder.code_references import code_references
from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.folders import inspect_source
from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.adapter_folder.names import OUR_CONFIG, WEIGHTS
from minilora_hub.adapter_folder.tasks import is_own_auto_map, own_auto_map
from minilora_hub.adapter_folder.verification import VERIFICATION_FILE, Verification, is_hashed
from minilora_hub.errors import AdapterError
from minilora_hub.hub.plain_files import require_plain_files, require_true_sizes
from minilora_hub.publish.verify.report import VerifyReport
from minilora_hub.recording.logits import TOLERANCES


def check_files(folder: Path, report: VerifyReport, trust: bool) -> tuple[Source, Verification] | None:
    """Check the files without running anything. Return None if a check fails."""
    try:
        require_plain_files(folder)
        source = inspect_source(folder)
        if not (folder / VERIFICATION_FILE).is_file():
            raise AdapterError(
                f"no {VERIFICATION_FILE}, the record to compare with, which `minilora push` writes into the repo: "
                "push the folder, then verify the repo; `minilora push DIR REPO --dry-run` checks the folder before"
            )
        verification = Verification.load(folder)
    except AdapterError as error:
        report.add("files", False, str(error))
        return None
    code = code_files(folder)
    report.code = code_hash(code) if code else None
    _check_hashes(folder, verification, report)
    _check_code(source, code, report, trust)
    _check_settings(verification, report)
    if report.ok:
        try:
            require_true_sizes(folder)
        except AdapterError as error:
            report.add("files", False, str(error))
    return (source, verification) if report.ok else None


def _check_hashes(folder: Path, verification: Verification, report: VerifyReport) -> None:
    present = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".cache" not in path.relative_to(folder).parts[:1]
    }
    expected = verification.sha256
    missing = sorted(expected.keys() - present.keys())
    surplus = sorted(name for name in present.keys() - expected.keys() if is_hashed(name))
    wrong = [
        name for name, digest in sorted(expected.items()) if name in present and file_sha256(present[name]) != digest
    ]
    problems = [
        f"{what} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in (("missing:", missing), ("not recorded:", surplus), ("changed since:", wrong))
        if names
    ]
    if WEIGHTS not in expected:
        problems.append(f"{VERIFICATION_FILE} has no hash of {WEIGHTS}")
    total = f"{len(expected)} files are those of {VERIFICATION_FILE}"
    report.add("hashes", not problems, "; ".join(problems) or total)


def _check_code(source: Source, code: dict[str, Path], report: VerifyReport, trust: bool) -> None:
    release = release_of(report.code) if report.code else None
    if other := _other_code(source, released=release is not None):
        report.add("code", False, f"{other}: nothing was run")
    elif source.layout == "peft":
        endpoint = endpoint_files(peft_layout=True).keys()
        if code and release and code.keys() <= endpoint:
            report.add("code", True, f"an endpoint's alone, released by minilora_hub ({release}), {report.code}")
        else:
            other = min(code.keys() - endpoint, default=None) or min(code, default=None)
            detail = f"PEFT's layout needs none, but there is {other}" if code else "it has none, and needs none"
            report.add("code", not code, detail)
    elif release:
        report.add("code", True, f"released by minilora_hub ({release}), {report.code}")
    elif trust:
        report.add("code", True, f"unknown, and trusted by trust_remote_code, {report.code}")
    else:
        need = "nothing was run; read it, and pass trust_remote_code=True (--trust-remote-code) to run it"
        report.add("code", False, f"{report.code or 'there is none'} is not a release of minilora_hub: {need}")


def _other_code(source: Source, released: bool) -> str | None:
    """Return the first reference that would make a library run code other than the hashed files, or None.

    Args:
        source: the adapter.
        released: whether its code is a release of minilora_hub: then it may name only the classes of that release.
    """
    references = code_references(source.folder)
    away = next((str(reference) for reference in references if reference.problem), None)
    if away or source.layout == "peft" or not released:
        return away
    given, expected = source.config.get("auto_map"), own_auto_map(source.config["model_type"])
    if not is_own_auto_map(given, source.config["model_type"]):
        return f"{OUR_CONFIG}: auto_map={str(given)[:200]}: must be like {expected}, the classes of this code"
    return next(
        (f"{reference}, which is not a class of minilora_hub" for reference in references if not reference.own), None
    )


def _check_settings(verification: Verification, report: VerifyReport) -> None:
    """Check the dtype and the tolerance of verification.json before anything is computed."""
    if verification.dtype not in TOLERANCES:
        detail = f"{VERIFICATION_FILE}: dtype={verification.dtype!r}: must be one of {sorted(TOLERANCES)}"
        report.add("recording", False, detail)
    elif verification.tolerance > TOLERANCES[verification.dtype]:
        limit = TOLERANCES[verification.dtype]
        detail = f"tolerance={verification.tolerance:g}: {verification.dtype} needs no more than {limit:g}"
        report.add("recording", False, f"{VERIFICATION_FILE}: {detail}")
