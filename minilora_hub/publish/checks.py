"""Every check of a folder before it is published: a list of problems, each with what to do about it.

    check_files     stray, missing, oversized, executable files; links; odd names; pickles and archives
    check_texts     secrets; paths of somebody's machine; JSON that does not parse or is ambiguous
    check_code      the island's files and their imports; entries that point to other code
    check_base      the base is a model on the Hub; licences
    check_tensors   the configuration loads; the tensors are finite and exactly those it implies
    check_card      results.json, verification.json and the card agree with the files and each other

A folder without a blocking problem is fit to be published; that it answers as it should is for `verify` to prove. A
check that cannot be made says so in a problem of its own. Nothing of the folder is run or unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from minilora_hub.errors import AdapterError
from minilora_hub.publish.check_base import BaseExists, BaseLicense, HubBase, check_base, check_license
from minilora_hub.publish.check_card import check_card, check_results, check_verification
from minilora_hub.publish.check_code import check_auto_map, check_island
from minilora_hub.publish.check_files import check_layout, check_pickles, read_folder
from minilora_hub.publish.check_tensors import check_adapter
from minilora_hub.publish.check_texts import check_json, check_machine_paths, check_secrets
from minilora_hub.publish.check_tokenizer import check_tokenizer
from minilora_hub.publish.hashes import Hashes
from minilora_hub.publish.problems import Folder, Problem
from minilora_hub.publish.shapes import Shapes

__all__ = ["Problem", "check_folder", "check_model"]


def check_model(folder: Path, loaded: Shapes | None) -> list[Problem]:
    """Check the configuration and the tensors alone: the long part of `check_folder`, which takes its result.

    Args:
        folder: the folder; it may be unfinished.
        loaded: which tensors a model had that was loaded from this configuration; None where none was.
    """
    return list(check_adapter(read_folder(folder, Hashes())[0], loaded))


def check_folder(
    folder: Path,
    *,
    base_exists: BaseExists | None = None,
    base_license: BaseLicense | None = None,
    hashes: Hashes | None = None,
    model_problems: Sequence[Problem] | None = None,
    rendered: str | None = None,
) -> list[Problem]:
    """Check a folder that is about to be published.

    Args:
        folder: the folder, built, with its card.
        base_exists: tells whether a base (id, revision) is on the Hub; default: asks it. If it raises, the answer is
            unknown, which is reported.
        base_license: tells a base's licence (id, revision), None if it has none; default: asks the Hub.
        hashes: of the folder's files, where somebody has read them already.
        model_problems: what `check_model` has found of this folder; default: it is asked.
        rendered: the card that was rendered from the files of which verification.json holds the hashes; default: it is
            rendered from what lies in the folder.

    Returns:
        The problems, the blocking ones first; empty if there are none.

    Raises:
        AdapterError: there is no such folder.
        MissingExtraError: the extra ``publish``, which brings the secret scanner, is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"folder={str(folder)!r}: no such folder")
    hub = HubBase()
    found, problems = read_folder(folder, hashes or Hashes())
    checks: list[Callable[[Folder], Iterator[Problem]]] = [
        check_layout,
        check_pickles,
        check_json,
        check_secrets,
        check_machine_paths,
        check_island,
        check_auto_map,
        lambda f: check_base(f, base_exists or hub.exists),
        lambda f: check_license(f, base_license or hub.license),
        check_adapter if model_problems is None else lambda _: iter(model_problems),
        check_tokenizer,
        check_results,
        check_verification,
        lambda f: check_card(f, rendered),
    ]
    for check in checks:
        problems += check(found)
    unique = list(dict.fromkeys(problems))
    return sorted(unique, key=lambda problem: (not problem.blocking, problem.file, problem.code, problem.message))
