"""Hash the code and list the libraries that a stored result depends on, as parts of its cache key.

    code_inputs("minilora_hub.evaluation.run") | library_inputs()
    # {"code/evaluation/run.py": "9f2c…", …, "library/torch": "2.13.0+cpu", …}

The code is the named modules and every module of this package that they import, directly or indirectly, also inside
functions. A list of files written by hand would become incomplete, and the package's version does not change while its
files are edited.

Import statements are found with a regular expression, which takes 10 ms where parsing the files takes 0.2 s. An import
in a docstring counts as well, which can only add a file. Nothing here imports the modules that it reads.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import minilora_hub

PACKAGE = Path(__file__).resolve().parent
NAME = PACKAGE.name
NO_VALUES = frozenset({NAME, f"{NAME}.errors"})
"""Modules that no result depends on: the public names, and the exceptions."""

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "accelerate", "bitsandbytes")
"""Listed with their full versions, as builds for CUDA and CPU differ. accelerate places weights for PEFT; bitsandbytes
computes with quantised bases."""

FROM_IMPORT = re.compile(r"^[ \t]*from[ \t]+([.\w]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)", re.MULTILINE)
IMPORT = re.compile(r"^[ \t]*import[ \t]+([^\n]*)", re.MULTILINE)


@cache
def code_inputs(*modules: str) -> dict[str, str]:
    """Hash the source of modules and of everything of this package that they import.

    Args:
        *modules: full names, e.g. ``"minilora_hub.recording.reference"``.

    Returns:
        ``{"code/<path in the package>": sha256}``, sorted by path.

    Raises:
        ValueError: there is no such module.
    """
    found: dict[str, str] = {}
    waiting, seen = list(modules), set(modules) | NO_VALUES
    while waiting:
        name = waiting.pop()
        path = _path_of(name)
        if path is None:
            raise ValueError(f"module {name!r}: must be a module of {NAME}")
        source = path.read_bytes()
        found[f"code/{path.relative_to(PACKAGE).as_posix()}"] = hashlib.sha256(source).hexdigest()
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        new = {other for other in imported_names(source.decode(), package) if _path_of(other)} - seen
        seen |= new
        waiting += new
    return dict(sorted(found.items()))


def code_hash(*modules: str) -> str:
    """Return one sha256, in hexadecimal digits, over `code_inputs`."""
    return hashlib.sha256(repr(code_inputs(*modules)).encode()).hexdigest()


@cache
def library_inputs(*more: str) -> dict[str, str]:
    """Return ``{"library/<name>": version}`` of `LIBRARIES` and `more`, as far as they are installed."""
    found = {}
    for name in (*LIBRARIES, *more):
        try:
            found[f"library/{name}"] = version(name)
        except PackageNotFoundError:
            continue
    return found


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the names whose values differ, sorted."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def imported_names(source: str, package: str) -> set[str]:
    """Return the full name of everything that a source file imports: modules, and names that may be modules.

    Args:
        source: the file's text.
        package: full name of the package that the file is in, for its relative imports.
    """
    found: set[str] = set()
    for names in IMPORT.findall(source):
        found.update(re.findall(r"[\w.]+", names))
    for origin, names in FROM_IMPORT.findall(source):
        module = origin.lstrip(".")
        if above := len(origin) - len(module):
            parts = package.split(".")
            module = ".".join([*parts[: len(parts) - above + 1], *([module] if module else [])])
        members = re.findall(r"\w+", names)
        found.update((module, *(f"{module}.{member}" for member in members)))
        if module == NAME:  # its public names are lazy, and defined in other modules
            found.update(minilora_hub._MODULES[member] for member in members if member in minilora_hub._MODULES)
    return found


def _path_of(module: str) -> Path | None:
    """Return the file of a module of this package; None for any other name."""
    first, *rest = module.split(".")
    place = PACKAGE.joinpath(*rest)
    files = [place / "__init__.py", *([place.with_suffix(".py")] if rest else [])]
    return next((path for path in files if path.is_file()), None) if first == NAME else None
