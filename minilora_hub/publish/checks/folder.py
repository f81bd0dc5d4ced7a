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

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minilora_hub.adapter_folder.hashes import Hashes, Stamp, stamp
from minilora_hub.errors import AdapterError
from minilora_hub.publish.checks.base import BaseExists, BaseLicense, HubBase, check_base, check_license
from minilora_hub.publish.checks.card import check_card, check_results, check_verification
from minilora_hub.publish.checks.code import check_auto_map, check_island
from minilora_hub.publish.checks.files import check_layout, check_pickles, read_folder
from minilora_hub.publish.checks.problems import Folder, Problem
from minilora_hub.publish.checks.tensors import check_adapter
from minilora_hub.publish.checks.texts import check_json, check_machine_paths, check_secrets
from minilora_hub.publish.checks.tokenizer import check_tokenizer
from minilora_hub.recording.shapes import Shapes

__all__ = ["Checked", "Problem", "check_folder", "check_unfinished"]


# Each looks at files one by one.
OF_FILES = (check_pickles, check_json, check_secrets, check_machine_paths, check_island, check_auto_map)


@dataclass(frozen=True)
class Checked:
    """What `check_unfinished` has found.

    Attributes:
        problems: what is wrong.
        stamps: the files it looked at, and how they were.
    """

    problems: tuple[Problem, ...]
    stamps: dict[str, Stamp]

    def holds(self, folder: Folder) -> bool:
        """Whether all of these files are still as they were."""
        return all(name in folder.files and stamp(folder.files[name]) == was for name, was in self.stamps.items())


def check_unfinished(
    folder: Path,
    *,
    base_exists: BaseExists | None = None,
    base_license: BaseLicense | None = None,
    loaded: Shapes | None = None,
    rendered: str | None = None,
) -> Checked:
    """Check what is in a folder that only lacks verification.json: most of `check_folder`, which takes the result.

    Args:
        folder: the folder.
        base_exists: see `check_folder`.
        base_license: see `check_folder`.
        loaded: which tensors a model had that was loaded from this configuration; default: it is worked out.
        rendered: the card as it was just rendered from these files; default: it is rendered.
    """
    found, _ = read_folder(folder, Hashes())
    stamps = {name: stamp(path) for name, path in found.files.items()}
    return Checked(tuple(_check_contents(found, base_exists, base_license, loaded, rendered)), stamps)


def _check_contents(
    folder: Folder,
    base_exists: BaseExists | None,
    base_license: BaseLicense | None,
    loaded: Shapes | None = None,
    rendered: str | None = None,
) -> Iterator[Problem]:
    hub = HubBase()
    for check in OF_FILES:
        yield from check(folder)
    yield from check_base(folder, base_exists or hub.exists)
    yield from check_license(folder, base_license or hub.license)
    yield from check_adapter(folder, loaded)
    yield from check_tokenizer(folder)
    yield from check_results(folder)
    yield from check_card(folder, rendered)


def check_folder(
    folder: Path,
    *,
    base_exists: BaseExists | None = None,
    base_license: BaseLicense | None = None,
    hashes: Hashes | None = None,
    earlier: Checked | None = None,
) -> list[Problem]:
    """Check a folder that is about to be published.

    Args:
        folder: the folder, built, with its card.
        base_exists: tells whether a base (id, revision) is on the Hub; default: asks it. If it raises, the answer is
            unknown, which is reported.
        base_license: tells a base's licence (id, revision), None if it has none; default: asks the Hub.
        hashes: of the folder's files, where somebody has read them already.
        earlier: what `check_unfinished` found here; it counts where no file is another one since.

    Returns:
        The problems, the blocking ones first; empty if there are none.

    Raises:
        AdapterError: there is no such folder.
        MissingExtraError: the extra ``publish``, which brings the secret scanner, is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"folder={str(folder)!r}: no such folder")
    found, problems = read_folder(folder, hashes or Hashes())
    if earlier is not None and earlier.holds(found):
        problems += earlier.problems
        new = Folder(folder, {name: path for name, path in found.files.items() if name not in earlier.stamps})
        problems += [problem for check in OF_FILES for problem in check(new)]
    else:
        problems += _check_contents(found, base_exists, base_license)
    problems += check_layout(found)
    problems += check_verification(found)
    unique = list(dict.fromkeys(problems))
    return sorted(unique, key=lambda problem: (not problem.blocking, problem.file, problem.code, problem.message))
