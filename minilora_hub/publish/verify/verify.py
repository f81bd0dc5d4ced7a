"""Verify that a published adapter works where minilora_hub is not installed, and computes what it recorded.

First the files are checked without running anything (`file_checks.py`). Then an isolated process without token and
network (`isolated_worker.py`) loads the adapter through AutoModel, compares logits and tries damaged weights. The base
is downloaded before that, in this process.
"""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.names import PEFT_CONFIG, PROCESSING, TOKENIZER_FILES, WEIGHTS
from minilora_hub.adapter_folder.verification import Verification, plain_prompts
from minilora_hub.bases.resolving import EMBEDDED, resolve_base
from minilora_hub.errors import AdapterError, BaseModelError
from minilora_hub.hub.client import fetch, require_no_revision
from minilora_hub.publish.verify.damage import copy_for_damage, damages
from minilora_hub.publish.verify.file_checks import check_files
from minilora_hub.publish.verify.isolated_process import IsolatedProcess
from minilora_hub.publish.verify.report import VerifyReport
from minilora_hub.recording.logits import difference

OWN_CLASS = re.compile(r"transformers_modules\..*\.(MixLora|Dora)(For[A-Za-z0-9]+|Model)")


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
        ValueError: a revision of a folder is given.
    """
    name, commit, folder = os.fspath(repo_or_dir), None, Path(repo_or_dir)
    if folder.is_dir():
        require_no_revision(name, revision)
    else:
        folder, commit = fetch(name, revision=revision, token=token, progress=progress)
    report = VerifyReport(name, commit)
    checked = check_files(folder, report, trust_remote_code)
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
                "prompts": plain_prompts(verification.prompts),
                "tokens": verification.top_tokens,
                "copy": copy,
                "damages": {name: [offset, content.hex()] for name, (offset, content) in wrong.items()},
                "peft": str(peft.resolve()) if ours and (peft / PEFT_CONFIG).is_file() else None,
                "tokenizer": any((source.folder / name).is_file() for name in TOKENIZER_FILES),
                "processor": any((source.folder / name).is_file() for name in PROCESSING),
            },
            report.code,
        )
    if "error" in answer:
        report.add("loading", False, answer["error"])
        return
    from_repo = bool(OWN_CLASS.fullmatch(answer["class"]))
    expected = from_repo if ours else answer["class"].split(".")[0] in ("transformers", "peft")
    report.add("loading", expected, f"{answer['class']}, from {'the repo' if from_repo else 'an installed package'}")
    if "processor" in answer:
        report.add("processor", True, answer["processor"] or "loaded, without code of the repo")
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
