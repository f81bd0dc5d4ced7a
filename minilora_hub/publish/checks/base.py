"""Check the base that an adapter names, and the licences of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from minilora_hub.adapter_folder.names import PEFT_CONFIG
from minilora_hub.adapter_folder.results import RESULTS_FILE
from minilora_hub.bases.resolving import EMBEDDED
from minilora_hub.errors import AdapterError
from minilora_hub.hub.client import COMMIT, REPO_ID
from minilora_hub.publish.checks.problems import Folder, Problem

BaseExists = Callable[[str, str | None], bool | None]
"""Takes a base and its revision and returns whether the Hub has it; None or an exception if that is unknown."""
BaseLicense = Callable[[str, str | None], str | None]

PERMISSIVE = {
    "apache-2.0", "mit", "mit-0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "0bsd", "zlib",
    "unlicense", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "pddl", "wtfpl", "ncsa", "bsl-1.0",
    "artistic-2.0", "ms-pl", "postgresql", "afl-3.0", "ecl-2.0", "odc-by", "cdla-permissive-1.0", "cdla-permissive-2.0",
}  # fmt: skip
"""Licences that permit a derivative under another licence. Under any other, the adapter must keep the base's."""


def base_of(folder: Folder) -> tuple[str | None, str | None]:
    """Return the base's id and revision as the configuration names them."""
    config = folder.config
    base, revision = config.get("base_model_name_or_path"), config.get("base_model_revision", config.get("revision"))
    return base if isinstance(base, str) else None, revision if isinstance(revision, str) else None


def is_hub_id(base: str) -> bool:
    """Return whether a name is a valid id of a model on the Hub."""
    return bool(REPO_ID.fullmatch(base)) and base != EMBEDDED and "--" not in base and ".." not in base


def check_base(folder: Folder, exists: BaseExists) -> Iterator[Problem]:
    """Check that the base is a model on the Hub, and pinned to a commit."""
    file = PEFT_CONFIG if folder.peft_layout else "config.json"
    if not folder.config:
        return
    base, revision = base_of(folder)
    field = f"base_model_name_or_path={base!r}"
    if not base:
        remedy = "set it to the base's id on the Hub"
        yield Problem(
            "base-missing",
            file,
            "base_model_name_or_path is not set: the adapter cannot be loaded",
            remedy,
        )
        return
    if not is_hub_id(base):
        what = "an alias that only minilora_hub knows" if base == EMBEDDED else "not an id of a model on the Hub"
        remedy = "write the id on the Hub of the same weights: owner/name"
        yield Problem("base-local", file, f"{field} is {what}", remedy)
        return
    yield from check_existence(file, base, revision, exists)
    if not revision or not COMMIT.fullmatch(revision):
        message = f"base_model_revision={revision!r} is not a commit: the base may change under the adapter"
        yield Problem(
            "base-unpinned", file, message, "set it to the commit of the base it was trained on", blocking=False
        )


def check_existence(file: str, base: str, revision: str | None, exists: BaseExists) -> Iterator[Problem]:
    """Check that the base named in `file` is on the Hub, at the named revision."""
    field, at = f"base_model_name_or_path={base!r}", f" at revision {revision!r}" if revision else ""
    reason = ""
    try:
        found = exists(base, revision)
    except Exception as error:  # the client raises many kinds
        found, reason = None, f" ({type(error).__name__})"
    if found is None:
        message = f"{field}: whether it exists{at} is unknown: the Hub gave no answer{reason}"
        yield Problem("base-unknown", file, message, "check again with a connection", blocking=False)
    elif not found:
        remedy = "check id and revision; a private base is found with your token, but not by those you publish for"
        yield Problem("base-not-found", file, f"{field}: the Hub has no such model{at}", remedy)


def check_own_license(license: str | None) -> Iterator[Problem]:
    """Check that the adapter has a licence."""
    if not license:
        message = "license is not set: without one, others may not use the adapter"
        yield Problem("license-missing", RESULTS_FILE, message, "set it in results.json: minilora push --license ID")


def check_license(folder: Folder, license_of: BaseLicense) -> Iterator[Problem]:
    """Check that the adapter has a licence, and that the base's licence permits it."""
    results = folder.results
    if isinstance(results, AdapterError):
        return  # found by another check
    own = results.license_name if results.license == "other" and results.license_name else results.license
    yield from check_own_license(own)
    base, revision = base_of(folder)
    if not base or not is_hub_id(base):
        return
    try:
        theirs = license_of(base, revision)
    except Exception as error:
        reason = f"the Hub gave no answer ({type(error).__name__})"
        theirs = None
    else:
        reason = "its card names none"
    if theirs is None:
        message = f"the licence of the base {base} is unknown: {reason}"
        remedy = "read the base's page: its terms may bind the adapter"
        yield Problem("license-unknown", RESULTS_FILE, message, remedy, blocking=False)
        theirs = results.base.license
    elif results.base.license and results.base.license.lower() != theirs.lower():
        message = f"base.license={results.base.license!r}, but the Hub says {theirs!r}"
        yield Problem("license-contradicts", RESULTS_FILE, message, "correct it")
    if own and theirs and theirs.lower() not in PERMISSIVE and own.lower() != theirs.lower():
        message = f"license={own!r} contradicts the base's {theirs!r}, whose terms apply to what is made from it"
        remedy = f"publish the adapter under {theirs!r}; a licence with a name of its own is 'other' and license_name"
        yield Problem("license-contradicts", RESULTS_FILE, message, remedy)
