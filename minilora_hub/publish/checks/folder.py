"""Check a folder before it is published: return a list of problems, each with what to do about it.

    files       stray, missing, oversized, executable files; links; odd names; pickles and archives
    texts       secrets; paths of the author's machine; JSON that does not parse or is ambiguous
    code        the files of the remote code and their imports; entries that refer to other code
    base        the base is a model on the Hub; licences
    tensors     the configuration loads; the tensors are finite and exactly those that it implies
    tokenizer   the tokenizer, the chat template and the generation settings load
    card        results.json, verification.json and the card agree with the files and each other

A folder without a blocking problem may be published; `verify` then checks that it computes the recorded logits.
A check that cannot be made is itself reported as a problem. No code of the folder is run, and nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

from minilora_hub.errors import AdapterError
from minilora_hub.hub.client import BaseOnHub
from minilora_hub.publish.checks.base import BaseExists, BaseLicense, check_base, check_license
from minilora_hub.publish.checks.card import check_card, check_results, check_verification
from minilora_hub.publish.checks.code import check_auto_map, check_code_files
from minilora_hub.publish.checks.files import check_layout, check_pickles, read_folder
from minilora_hub.publish.checks.problems import Problem
from minilora_hub.publish.checks.tensors import check_adapter
from minilora_hub.publish.checks.texts import check_json, check_machine_paths, check_secrets
from minilora_hub.publish.checks.tokenizer import check_tokenizer

__all__ = ["Problem", "check_folder"]

CHECKS = (
    check_layout,
    check_pickles,
    check_json,
    check_secrets,
    check_machine_paths,
    check_code_files,
    check_auto_map,
    check_adapter,
    check_tokenizer,
    check_results,
    check_verification,
    check_card,
)


def check_folder(
    folder: Path, *, base_exists: BaseExists | None = None, base_license: BaseLicense | None = None
) -> list[Problem]:
    """Check a folder that is about to be published.

    Args:
        folder: the folder, built, with its card.
        base_exists: returns whether a base (id, revision) is on the Hub; default: ask it. An exception means that the
            answer is unknown, which is reported.
        base_license: returns a base's licence (id, revision), None if it has none; default: ask the Hub.

    Returns:
        The problems, the blocking ones first; empty if there are none.

    Raises:
        AdapterError: there is no such folder.
        MissingExtraError: the extra ``publish``, which brings the secret scanner, is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"folder={str(folder)!r}: no such folder")
    hub = BaseOnHub()
    found, problems = read_folder(folder)
    problems += check_base(found, base_exists or hub.exists)
    problems += check_license(found, base_license or hub.license)
    for check in CHECKS:
        problems += check(found)
    unique = list(dict.fromkeys(problems))
    return sorted(unique, key=lambda problem: (not problem.blocking, problem.file, problem.code, problem.message))
