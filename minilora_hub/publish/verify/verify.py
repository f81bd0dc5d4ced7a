"""Verify that a published adapter works where minilora_hub is not installed, and computes what it recorded.

First the files are checked without running anything: whether they are regular files, whether their hashes match, and
whether the code is a release of minilora_hub without references to other code. verification.json comes from the repo
itself, so its hashes detect damage, not bad intent. Unknown code is refused unless `trust_remote_code` is set; a
reference to the code of another repo is always refused. Then an isolated process without token and network
(`isolated_worker.py`) loads the adapter through AutoModel, compares logits and tries damaged weights. The base is
downloaded before that, in this process.
"""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.code import code_files, code_hash, endpoint_files, release_of
from minilora_hub.adapter_folder.code_references import code_references
from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.folders import inspect_source
from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.adapter_folder.names import OUR_CONFIG, PEFT_CONFIG, TOKENIZER_FILES, WEIGHTS
from minilora_hub.adapter_folder.results import VERIFICATION_FILE, Verification, is_hashed
from minilora_hub.adapter_folder.tasks import is_own_auto_map, own_auto_map
from minilora_hub.bases.resolving import EMBEDDED, resolve_base
from minilora_hub.errors import AdapterError, BaseModelError
from minilora_hub.hub.client import fetch
from minilora_hub.hub.plain_files import require_plain_files, require_true_sizes
from minilora_hub.publish.verify.damage import copy_for_damage, damages
from minilora_hub.publish.verify.isolated_process import IsolatedProcess
from minilora_hub.recording.logits import TOLERANCES, difference

OWN_CLASS = re.compile(r"transformers_modules\..*\.(MixLora|Dora)(For[A-Za-z0-9]+|Model)")


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


def verify(
    repo_or_dir: str | os.PathLike[str],
    *,
    revision: str | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    token: str | None = None,
    progress: bool = True,
    process: IsolatedProcess | None = None,
) -> VerifyReport:
    """Verify an adapter in a repo or a folder.

    Args:
        repo_or_dir: Hub id, or a folder in the published form.
        revision: branch, tag or commit on the Hub. Default: main.
        base_model: where to load the base from, e.g. ``"embedded"`` or a folder. Default: the base the adapter names.
        trust_remote_code: run code of the repo that is not a release of minilora_hub. Released code always runs, and
            code of other repos never.
        token: for private repos. Default: the one of ``hf auth login``.
        progress: show bars on stderr while files are fetched.
        process: where to load the adapter, to verify several in one process. Default: a new one.

    Returns:
        The report. A failed check is reported there and does not raise.

    Raises:
        AdapterError: the repo or folder is not there, or the Hub cannot be reached.
        BaseModelError: `base_model` cannot be found.
    """
    name, commit, folder = os.fspath(repo_or_dir), None, Path(repo_or_dir)
    if not folder.is_dir():
        folder, commit = fetch(name, revision=revision, token=token, progress=progress)
    report = VerifyReport(name, commit)
    checked = _check_files(folder, report, trust_remote_code)
    if checked is None:
        return report
    source, verification = checked
    base = str(resolve_base(base_model, token=token, progress=progress).path) if base_model else None
    if base is None and not _fetch_base(source, report, token, progress):
        return report
    # PEFT's layout from the cached folder: transformers would look for the adapter's commit in the base's repo.
    by_name = commit is not None and source.layout == "auto"
    target = (name, commit) if by_name else (str(folder.resolve()), None)
    with nullcontext(process) if process else IsolatedProcess() as worker:
        _check_behaviour(worker, source, verification, target, base, report)
    return report


def _check_files(folder: Path, report: VerifyReport, trust: bool) -> tuple[Source, Verification] | None:
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


def _fetch_base(source: Source, report: VerifyReport, token: str | None, progress: bool) -> bool:
    """Fetch the base that the adapter names into the Hub's cache, since the isolated process has no network."""
    # AutoModel loads the newest base for PEFT's layout, whatever revision is named.
    revision = source.base_revision if source.layout == "auto" else None
    try:
        if not source.base or source.base == EMBEDDED:
            need = "pass the base that it was trained on, base_model= (--base)"
            raise BaseModelError(f"base_model_name_or_path={source.base!r} is not an id on the Hub: {need}")
        resolve_base(source.base, revision=revision, token=token, progress=progress)
    except BaseModelError as error:
        return report.add("loading", False, str(error))
    return True


def _check_behaviour(
    process: IsolatedProcess,
    source: Source,
    verification: Verification,
    target: tuple[str, str | None],
    base: str | None,
    report: VerifyReport,
) -> None:
    """Load the adapter in the isolated process, and check its answer."""
    peft = source.folder / "peft"
    ours = source.layout == "auto"
    with tempfile.TemporaryDirectory(prefix="minilora-damaged-") as scratch:
        try:
            wrong = damages(source.folder / WEIGHTS) if ours else {}
            copy = str(copy_for_damage(source.folder, Path(scratch))) if ours else None
        except AdapterError as error:
            report.add("loading", False, str(error))
            return
        answer = process.run(
            {
                "target": target[0],
                "revision": target[1],
                "layout": source.layout,
                "auto_class": source.auto_class,
                "base": base,
                "dtype": verification.dtype,
                "prompts": verification.prompts,
                "tokens": verification.top_tokens,
                "copy": copy,
                "damages": {name: [offset, content.hex()] for name, (offset, content) in wrong.items()},
                "peft": str(peft.resolve()) if ours and (peft / PEFT_CONFIG).is_file() else None,
                "tokenizer": any((source.folder / name).is_file() for name in TOKENIZER_FILES),
            },
            report.code,
        )
    if "error" in answer:
        report.add("loading", False, answer["error"])
        return
    from_repo = bool(OWN_CLASS.fullmatch(answer["class"]))
    expected = from_repo if ours else answer["class"].split(".")[0] in ("transformers", "peft")
    report.add("loading", expected, f"{answer['class']}, from {'the repo' if from_repo else 'an installed package'}")
    hint = "" if base else "; if it was trained on other weights than the base's repo holds, pass base_model= (--base)"
    report.difference = _compare("logits", answer["logits"], verification, report, hint)
    for name, message in answer.get("refusals", {}).items():
        refused = f"refused ({message})" if message is not None else "loaded without an error"
        report.add(f"copy with {name}", message is not None, refused)
    if "peft" in answer:
        _compare("peft/", answer["peft"], verification, report)


def _compare(
    name: str, logits: list[dict[str, Any]], verification: Verification, report: VerifyReport, hint: str = ""
) -> float:
    gap = difference(
        verification.top_logits, [row["wanted"] for row in logits], [row["highest_other"] for row in logits]
    )
    count = sum(len(row) for row in verification.top_logits)
    limit = verification.tolerance
    if gap <= limit:
        report.add(name, True, f"{count} logits within {gap:.2g} of the recorded ones (tolerance {limit:g})")
    else:
        report.add(name, False, f"differ by {gap:.2g} from the recorded ones (tolerance {limit:g}){hint}")
    return gap
