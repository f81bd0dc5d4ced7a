"""Check the names, types and sizes of the files, and search them for pickles."""

from __future__ import annotations

import os
import pickletools
import re
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path

from minilora_hub.adapter_folder.code import endpoint_files, remote_code_files
from minilora_hub.adapter_folder.names import EDITED_ON_THE_HUB, PEFT_CONFIG, PROCESSING, WEIGHTS
from minilora_hub.adapter_folder.tasks import inputs_of
from minilora_hub.publish.card.pictures import PICTURES
from minilora_hub.publish.checks.problems import Folder, Problem

MEBI = 2**20
# Every file that a published repo may hold, and its largest size.
LARGEST = {
    WEIGHTS: 20 * 1024 * MEBI,
    f"peft/{WEIGHTS}": 20 * 1024 * MEBI,
    **dict.fromkeys(("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"), 64 * MEBI),
    **dict.fromkeys(("config.json", "generation_config.json", "tokenizer_config.json", "peft/README.md"), 8 * MEBI),
    **dict.fromkeys(PROCESSING, MEBI),
    **dict.fromkeys(("special_tokens_map.json", "added_tokens.json", f"peft/{PEFT_CONFIG}"), 8 * MEBI),
    **dict.fromkeys(("chat_template.jinja", "additional_chat_templates/*.jinja"), MEBI),
    **dict.fromkeys(EDITED_ON_THE_HUB, MEBI),
    **dict.fromkeys(("README.md", "results.json", "verification.json"), 4 * MEBI),
    **dict.fromkeys(PICTURES, MEBI),
}
REQUIRED = ("config.json", WEIGHTS, "README.md", "results.json", "verification.json")
REQUIRED_PEFT = (PEFT_CONFIG, WEIGHTS, "README.md", "results.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*|\.gitattributes|\.eval_results")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.", re.IGNORECASE)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz", ".mar", ".nemo")
CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX"}
COMPRESSED = (
    b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x5d\0\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!", b"\x04\x22\x4d\x18",
)  # fmt: skip
PNG_HEAD, PNG_TAIL = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def read_folder(path: Path) -> tuple[Folder, list[Problem]]:
    """List a folder's regular files; report anything else in it as a problem."""
    files: dict[str, Path] = {}
    problems = []
    for place, folders, names in os.walk(path, followlinks=False):
        for name in sorted([*folders, *names]):
            entry = Path(place, name)
            shown = entry.relative_to(path).as_posix()
            if entry.is_symlink():
                remedy = "put the file itself there: a repo has no links, and this one may lead out of the folder"
                problems.append(Problem("link", shown, "is a symbolic link", remedy))
            elif not entry.is_dir() and not entry.is_file():
                problems.append(Problem("special-file", shown, "is not a regular file", "remove it"))
            elif entry.is_file():
                files[shown] = entry
        # Report a version-control folder once, not once per file.
        folders[:] = sorted(f for f in folders if f not in (".git", ".hg", ".svn") and not Path(place, f).is_symlink())
        problems += [
            Problem("stray", Path(place, f).relative_to(path).as_posix(), "belongs to version control", "remove it")
            for f in (".git", ".hg", ".svn")
            if Path(place, f).is_dir()
        ]
    return Folder(path, dict(sorted(files.items()))), problems


def check_layout(folder: Folder) -> Iterator[Problem]:
    """Find missing, stray, oversized and executable files, and names that some systems do not allow."""
    allowed = dict(LARGEST)
    if folder.peft_layout:
        allowed = {name: size for name, size in allowed.items() if name not in ("config.json", "verification.json")}
        allowed |= {PEFT_CONFIG: 8 * MEBI, "verification.json": 4 * MEBI}
    else:
        allowed |= dict.fromkeys(remote_code_files(), MEBI)
    endpoint = endpoint_files(folder.peft_layout)
    allowed |= dict.fromkeys(endpoint, MEBI)
    stray_folders: set[str] = set()
    for name, path in folder.files.items():
        limit = next((size for pattern, size in allowed.items() if fnmatchcase(name, pattern)), None)
        size = path.stat().st_size
        if name == PEFT_CONFIG and not folder.peft_layout:
            message = "is beside config.json: AutoModel would read it first and ignore the adapter's own class"
            yield Problem("adapter-config", name, message, "move it into peft/, or remove it")
        elif limit is None:
            top = name.partition("/")[0] if "/" in name else name
            known_folder = any(pattern.startswith(top + "/") for pattern in allowed)
            where = name if known_folder else top
            if where not in stray_folders:
                stray_folders.add(where)
                yield Problem("stray", where, "is not a file of a published adapter", "remove it, or keep it elsewhere")
        elif size > limit:
            message = f"has {size:,} bytes; a file of this name has at most {limit:,}"
            yield Problem("oversized", name, message, "look at what is in it, and make it smaller")
        elif size == 0:
            yield Problem("empty", name, "has 0 bytes", "write it again, or remove it")
        if os.name == "posix" and path.stat().st_mode & (stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH):
            yield Problem("executable", name, "may be executed", f"chmod a-x {name}")
    yield from _check_names(folder)
    inputs = "text" if folder.peft_layout else inputs_of(folder.config)
    required = REQUIRED_PEFT if folder.peft_layout else (*REQUIRED, *remote_code_files())
    if "text" in inputs and not folder.peft_layout:
        required = (*required, "tokenizer_config.json")
    if folder.files.keys() & endpoint.keys():
        required = (*required, *endpoint)
    for name in required:
        if name not in folder.files:
            yield Problem(
                "missing-file", name, "is missing", "build the folder again: minilora push does, before it sends"
            )
    if inputs != "text" and not any(name in folder.files for name in PROCESSING):
        message = f"no processor for {inputs}: one of {', '.join(PROCESSING)} is needed"
        yield Problem("missing-file", PROCESSING[0], message, "save the processor into the folder: save_pretrained()")
    if "text" in inputs and not any(name in folder.files for name in TOKENIZERS):
        message = f"no tokenizer: one of {', '.join(TOKENIZERS)} is needed"
        yield Problem(
            "missing-file", "tokenizer.json", message, "save the tokenizer into the folder: save_pretrained()"
        )


def _check_names(folder: Folder) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for name in folder.files:
        if not all(NAME.fullmatch(part) and not RESERVED.fullmatch(part) for part in name.split("/")):
            message = f"the name {name!r} does not work on every system"
            yield Problem("odd-name", name, message, "rename it: letters, digits, '.', '_' and '-'")
        other = seen.setdefault(name.lower(), name)
        if other != name:
            message = f"differs from {other!r} in upper and lower case only, which some systems do not distinguish"
            yield Problem("odd-name", name, message, "remove one of them")


def check_pickles(folder: Folder) -> Iterator[Problem]:
    """Find pickles (by name or content, also inside archives), archives, and pictures that are not PNGs."""
    remedy = "remove it: a pickle runs code when it is read; weights go into adapter_model.safetensors"
    for name, path in folder.files.items():
        if name.lower().endswith(PICKLES):
            yield Problem("pickle", name, "is a pickle, by its name", remedy)
            continue
        with path.open("rb") as file:
            head = file.read(MEBI)
        if zipfile.is_zipfile(path) or head.startswith(COMPRESSED) or _is_tar(path):
            pickled = [member for member in _members(path) if member.lower().endswith((*PICKLES, "data.pkl"))]
            if pickled:
                yield Problem("pickle", name, f"is an archive with a pickle in it ({pickled[0]})", remedy)
            else:
                message = "is an archive, whose content cannot be checked"
                yield Problem("archive", name, message, "unpack it and publish what is needed")
        elif looks_like_pickle(head):
            yield Problem("pickle", name, "is a pickle, by its content", remedy)
        elif name.endswith(".png") and not _is_png(path, head):
            yield Problem("picture", name, "is not a PNG, or more than one", "render the card again: minilora card DIR")


def _is_tar(path: Path) -> bool:
    """Return whether it is an uncompressed tar archive; compressed ones are known by their first bytes."""
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False


def _members(path: Path) -> list[str]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return archive.namelist()
        with tarfile.open(path) as archive:
            return archive.getnames()
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError):
        return []


def _is_png(path: Path, head: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(-min(len(PNG_TAIL), path.stat().st_size), os.SEEK_END)
        return head.startswith(PNG_HEAD) and file.read() == PNG_TAIL


def looks_like_pickle(head: bytes) -> bool:
    """Return whether bytes begin a pickle: a protocol mark and instructions, or (protocol 0) calls up to a stop."""
    marked = len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5
    names = []
    try:
        for opcode, _, _ in pickletools.genops(BytesIO(head)):
            names.append(opcode.name)
            if marked and len(names) > 2:
                return True
    except Exception:  # whatever the error, these bytes are not a pickle
        return False
    return marked or bool(CALLS.intersection(names))
