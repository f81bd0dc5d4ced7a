"""Find secrets, paths of the author's machine, and JSON that parsers read differently."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from minilora_hub.documents import strict_json
from minilora_hub.errors import MissingExtraError
from minilora_hub.publish.checks.problems import Folder, Problem, strings_in

VOCABULARIES = ("vocab.json", "vocab.txt", "merges.txt")
"""Files that are lists of tokens, where a match is a false positive."""

MACHINE_PATH = re.compile(
    r"""(?<![\w.:/~-])(?:file://)?
        (?: /(?:home|Users)/[\w.-]+ | /root/[\w.-]+ | /mnt/[a-z]/[\w.-]+ | /content/drive/ | /kaggle/working
          | /private/var/folders/ | [A-Za-z]:(?:\\{1,2}|/)Users(?:\\{1,2}|/)[\w.-]+ )""",
    re.VERBOSE,
)
REVOKE = "remove it, and revoke it where it was issued: it may have been copied already"
ANONYMOUS = (
    "write the Hub id instead, or remove it: the path means nothing elsewhere, and reveals something about this machine"
)


@cache
def _scanner() -> Any:
    try:
        from kingfisher_sdk import Scanner
    except ImportError:
        raise MissingExtraError("kingfisher_sdk", "publish") from None
    return Scanner()  # offline: it compares with patterns


def check_secrets(folder: Folder) -> Iterator[Problem]:
    """Find credentials in any file and in the metadata of the weights, and the user's own token."""
    own = get_token()
    found: set[tuple[str, str, int]] = set()
    for name, data in _contents(folder):
        if own and own.encode() in data and (name, "own", 0) not in found:
            found.add((name, "own", 0))
            yield Problem("secret", name, "holds the token you are logged in to the Hub with", REVOKE)
        for finding in _scanner().scan(data):
            line = int(finding.location["line"])
            if finding.visible and (name, finding.rule_id, line) not in found:
                found.add((name, finding.rule_id, line))
                kind = finding.rule_id.rpartition(".")[2].replace("-", " ")
                yield Problem("secret", name, f"line {line} looks like a secret ({kind})", REVOKE)


def _contents(folder: Folder) -> Iterator[tuple[str, bytes]]:
    for name in folder.files:
        data = folder.data(name)
        if data is not None:
            yield name, data
    for name, text in folder.unescaped.items():
        yield name, text.encode("utf-8", "replace")


def check_machine_paths(folder: Folder) -> Iterator[Problem]:
    """Find absolute paths of home folders and of this process in any text and in the weights' metadata."""
    own = _local_paths(folder.path)
    seen: set[str] = set()
    for name, text in chain(folder.texts.items(), folder.unescaped.items()):
        if name in VOCABULARIES or name in seen:
            continue
        searched = text
        if name == "tokenizer.json":  # `_without_vocabulary` decodes its escapes
            searched = _without_vocabulary(text)
            seen.add(name)
        if found := MACHINE_PATH.search(searched) or own.search(searched):
            seen.add(name)
            line = searched.count("\n", 0, found.start()) + 1
            where = f"line {line} names" if searched is text else "names"
            yield Problem("machine-path", name, f"{where} a path on a machine: {found[0][:80]!r}", ANONYMOUS)


def _local_paths(folder: Path) -> re.Pattern[str]:
    """Match the user's home, the working, checked and temporary folders, and paths below them."""
    places = {str(Path.home()), os.getcwd(), str(folder.absolute()), str(folder.resolve()), tempfile.gettempdir()}
    places = {place for place in places if len(place) > 3}  # "/" and "C:\\" are in every text
    places |= {place.replace("\\", "\\\\") for place in places}
    longest_first = sorted(places, key=len, reverse=True)
    return re.compile(
        rf"(?<![\w.:/~-])(?:{'|'.join(map(re.escape, longest_first))})(?=[/\\\s\"'`)\],;]|$)", re.MULTILINE
    )


def _without_vocabulary(text: str) -> str:
    try:
        content = json.loads(text)
        content["model"] = {k: v for k, v in content.get("model", {}).items() if k not in ("vocab", "merges")}
    except (ValueError, AttributeError, TypeError, RecursionError):
        return text
    return "\n".join(strings_in(content))


def check_json(folder: Folder) -> Iterator[Problem]:
    """Find JSON that does not parse, or that two parsers read differently."""
    for name in folder.files:
        if name.endswith(".json"):
            try:
                content = strict_json(folder.data(name) or b"")
            except ValueError as error:
                yield Problem("json", name, f"is not valid JSON: {error}", "write it again")
                continue
            if not isinstance(content, dict):
                yield Problem("json", name, "must hold a JSON object", "write it again")
