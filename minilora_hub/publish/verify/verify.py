"""Proof that a published adapter works: it is loaded where minilora_hub cannot be imported, and computes what its
verification.json says.

First the files are read, and nothing is run: whether they are plain files, their hashes, and whether the code is a
release of ours that nothing leads away from. verification.json is the repo's own, so its hashes tell of damage and not
of intent. Code that nobody knows is refused here unless `trust_remote_code` says otherwise, and a pointer to the code
of another repo in any case. The base is fetched here as well: the isolated process (`isolated_worker.py`) that then
loads the adapter through AutoModel, compares logits and tries damaged weights has neither a token nor the network.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.code import code_files, code_hash, release_of
from minilora_hub.adapter_folder.code_references import code_references, own_auto_map
from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.folders import read_source
from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.adapter_folder.names import OUR_CONFIG, PEFT_CONFIG, TOKENIZER_FILES, WEIGHTS
from minilora_hub.adapter_folder.results import VERIFICATION_FILE, Verification
from minilora_hub.bases.resolving import EMBEDDED, resolve_base
from minilora_hub.errors import AdapterError, BaseModelError
from minilora_hub.hub.client import fetch
from minilora_hub.hub.plain_files import require_plain_files, require_true_sizes
from minilora_hub.publish.verify.damage import copy_for_damage, damages
from minilora_hub.publish.verify.isolated_process import CleanProcess
from minilora_hub.recording.logits import TOLERANCES, difference

NOT_HASHED = ("README.md", ".gitattributes", VERIFICATION_FILE)
OWN_CLASS = re.compile(r"transformers_modules\..*\.(MixLora|Dora)ForCausalLM")


@dataclass(frozen=True)
class Step:
    """One thing that was looked at: what, whether it holds, and what was found."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        name: the repo or the folder.
        revision: the commit; None for a folder.
        steps: what was looked at, in order. The first one that fails may be the last.
        code: hash of the repo's Python files; None where it has none.
        difference: the largest difference of a logit from the recorded one; None where none was computed.
    """

    name: str
    revision: str | None
    steps: tuple[Step, ...]
    code: str | None = None
    difference: float | None = None

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return bool(self.steps) and all(step.ok for step in self.steps)

    @property
    def problem(self) -> str | None:
        """The first thing that does not hold, in one line."""
        return next((f"{step.name}: {step.detail}" for step in self.steps if not step.ok), None)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "name": self.name,
            "revision": self.revision,
            "ok": self.ok,
            "code": self.code,
            "difference": self.difference,
            "steps": [{"name": step.name, "ok": step.ok, "detail": step.detail} for step in self.steps],
        }


@dataclass
class _Findings:
    """The report while it grows."""

    steps: list[Step] = field(default_factory=list)
    code: str | None = None
    difference: float | None = None

    def add(self, name: str, ok: bool, detail: str) -> bool:
        self.steps.append(Step(name, ok, " ".join(detail.split())))
        return ok


def verify(
    repo_or_dir: str | os.PathLike[str],
    *,
    revision: str | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    token: str | None = None,
    progress: bool = True,
) -> VerifyReport:
    """Verify an adapter in a repo or a folder.

    Args:
        repo_or_dir: Hub id, or a folder as it is published.
        revision: branch, tag or commit on the Hub. Default: main.
        base_model: load the base from there, e.g. ``"embedded"`` or a folder. Default: the one the adapter names.
        trust_remote_code: run code of the repo that is no release of ours. Known code runs in any case, and code of
            other repos in none.
        token: for private repos. Default: the one of ``hf auth login``.
        progress: show bars on stderr while files are fetched.

    Returns:
        The report; it says what does not hold, and raises nothing for that.

    Raises:
        AdapterError: the repo or folder is not there, or the Hub cannot be reached.
        BaseModelError: `base_model` cannot be found.
    """
    with CleanProcess() as stranger:
        return verify_with(
            stranger,
            repo_or_dir,
            revision=revision,
            base_model=base_model,
            trust_remote_code=trust_remote_code,
            token=token,
            progress=progress,
        )


def verify_with(
    stranger: CleanProcess,
    repo_or_dir: str | os.PathLike[str],
    *,
    revision: str | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    token: str | None = None,
    progress: bool = True,
) -> VerifyReport:
    """Do what `verify` does, in a process that is already there: many adapters, one start."""
    name, commit, folder = os.fspath(repo_or_dir), None, Path(repo_or_dir)
    if not folder.is_dir():
        folder, commit = fetch(name, revision=revision, token=token, progress=progress)
    found = _Findings()
    checked = _check_files(folder, found, trust_remote_code)
    if checked is not None:
        source, verification = checked
        base = str(resolve_base(base_model, token=token, progress=progress).path) if base_model else None
        if base is None and not _fetch_base(source, found, token, progress):
            return VerifyReport(name, commit, tuple(found.steps), found.code)
        # Of PEFT's layout the copy in the cache: there transformers would look for the adapter's commit in the base.
        by_name = commit is not None and source.layout == "auto"
        target = (name, commit) if by_name else (str(folder.resolve()), None)
        _check_behaviour(stranger, source, verification, target, base, found)
    return VerifyReport(name, commit, tuple(found.steps), found.code, found.difference)


def _check_files(folder: Path, found: _Findings, trust: bool) -> tuple[Source, Verification] | None:
    """Read everything, run nothing. None where it ends here."""
    try:
        require_plain_files(folder)
        source = read_source(folder)
        verification = Verification.load(folder)
    except AdapterError as error:
        found.add("files", False, str(error))
        return None
    code = code_files(folder)
    if code:
        found.code = code_hash(code)
    hashes = _check_hashes(folder, verification, found)
    trusted = _check_code(source, code, found, trust)
    limits = _check_settings(verification, found)
    if hashes and trusted and limits:
        try:
            require_true_sizes(folder)
        except AdapterError as error:
            hashes = found.add("files", False, str(error))
    return (source, verification) if hashes and trusted and limits else None


def _check_hashes(folder: Path, verification: Verification, found: _Findings) -> bool:
    present = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".cache" not in path.relative_to(folder).parts[:1]
    }
    expected = verification.sha256
    missing = sorted(expected.keys() - present.keys())
    surplus = sorted(name for name in present.keys() - expected.keys() if name not in NOT_HASHED)
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
    return found.add("hashes", not problems, "; ".join(problems) or total)


def _check_code(source: Source, code: dict[str, Path], found: _Findings, trust: bool) -> bool:
    release = release_of(found.code) if found.code else None
    elsewhere = _other_code(source, released=release is not None)
    if elsewhere:
        return found.add("code", False, f"{elsewhere}: nothing was run")
    if source.layout == "peft":
        named = "it has none, and needs none" if not code else f"PEFT's layout needs none, but there is {min(code)}"
        return found.add("code", not code, named)
    if release:
        return found.add("code", True, f"released by minilora_hub ({release}), {found.code}")
    if trust:
        return found.add("code", True, f"unknown, and trusted by your word, {found.code}")
    need = "nothing was run; read it, and pass trust_remote_code=True (--trust-remote-code) to run it"
    return found.add("code", False, f"{found.code or 'there is none'} is no release of minilora_hub: {need}")


def _other_code(source: Source, released: bool) -> str | None:
    """Say what would make a library run other code than that which is hashed; None if nothing would.

    Args:
        source: the adapter.
        released: whether its code is a release of ours: then our own classes are all that it may name.
    """
    references = code_references(source.folder)
    away = next((str(reference) for reference in references if reference.problem), None)
    if away or source.layout == "peft" or not released:
        return away
    given, expected = source.config.get("auto_map"), own_auto_map(source.config["model_type"])
    if given != expected:
        return f"{OUR_CONFIG}: auto_map={str(given)[:200]}: must be {expected}, the classes of this code"
    return next((f"{reference}, which is no class of ours" for reference in references if not reference.own), None)


def _fetch_base(source: Source, found: _Findings, token: str | None, progress: bool) -> bool:
    """Bring the base that the adapter names into the Hub's cache, as the other process has no network."""
    # Of PEFT's layout AutoModel takes the newest base, whatever revision is named.
    revision = source.base_revision if source.layout == "auto" else None
    try:
        if not source.base or source.base == EMBEDDED:
            need = "pass the base that it was trained on, base_model= (--base)"
            raise BaseModelError(f"base_model_name_or_path={source.base!r} is no id on the Hub: {need}")
        resolve_base(source.base, revision=revision, token=token, progress=progress)
    except BaseModelError as error:
        return found.add("loading", False, str(error))
    return True


def _check_settings(verification: Verification, found: _Findings) -> bool:
    """What verification.json asks for, before anything is computed by it."""
    if verification.dtype not in TOLERANCES:
        detail = f"{VERIFICATION_FILE}: dtype={verification.dtype!r}: must be one of {sorted(TOLERANCES)}"
        return found.add("recording", False, detail)
    if verification.tolerance > TOLERANCES[verification.dtype]:
        limit = TOLERANCES[verification.dtype]
        detail = f"tolerance={verification.tolerance:g}: {verification.dtype} needs no more than {limit:g}"
        return found.add("recording", False, f"{VERIFICATION_FILE}: {detail}")
    return True


def _check_behaviour(
    stranger: CleanProcess,
    source: Source,
    verification: Verification,
    target: tuple[str, str | None],
    base: str | None,
    found: _Findings,
) -> None:
    """Load it in the other process, and judge what comes back."""
    peft = source.folder / "peft"
    with tempfile.TemporaryDirectory(prefix="minilora-damaged-") as scratch:
        try:
            ours = source.layout == "auto"
            wrong = damages(source.folder / WEIGHTS) if ours else {}
            copy = str(copy_for_damage(source.folder, Path(scratch))) if ours else None
        except AdapterError as error:
            found.add("loading", False, str(error))
            return
        answer = stranger.run(
            {
                "target": target[0],
                "revision": target[1],
                "layout": source.layout,
                "base": base,
                "dtype": verification.dtype,
                "prompts": verification.prompts,
                "tokens": verification.top_tokens,
                "copy": copy,
                "damages": {name: [damage.offset, damage.content.hex()] for name, damage in wrong.items()},
                "peft": str(peft.resolve()) if ours and (peft / PEFT_CONFIG).is_file() else None,
                "tokenizer": any((source.folder / name).is_file() for name in TOKENIZER_FILES),
            },
            found.code,
        )
    if "error" in answer:
        found.add("loading", False, answer["error"])
        return
    from_repo = bool(OWN_CLASS.fullmatch(answer["class"]))
    came = from_repo if ours else answer["class"].split(".")[0] in ("transformers", "peft")
    found.add("loading", came, f"{answer['class']}, from {'the repo' if from_repo else 'an installed package'}")
    hint = "" if base else "; if it was trained on other weights than the base's repo holds, pass base_model= (--base)"
    found.difference = _compare("logits", answer["logits"], verification, found, hint)
    for name, message in answer.get("refusals", {}).items():
        found.add(f"strict: {name}", message is not None, message or "a damaged copy was loaded without an error")
    if "peft" in answer:
        _compare("peft/", answer["peft"], verification, found, "")


def _compare(name: str, logits: list[dict[str, Any]], verification: Verification, found: _Findings, hint: str) -> float:
    gap = difference(
        verification.top_logits, [row["wanted"] for row in logits], [row["highest_other"] for row in logits]
    )
    count = sum(len(row) for row in verification.top_logits)
    limit = verification.tolerance
    if gap <= limit:
        found.add(name, True, f"{count} logits within {gap:.2g} of the recorded ones (tolerance {limit:g})")
    else:
        found.add(name, False, f"differ by {gap:.2g} from the recorded ones (tolerance {limit:g}){hint}")
    return gap
