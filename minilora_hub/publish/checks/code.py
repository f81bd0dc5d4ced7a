"""Check all code that loading or an endpoint could run: Python files, their imports, references to code elsewhere."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache

from minilora_hub.adapter_folder.code import REQUIREMENTS, endpoint_files, remote_code_files
from minilora_hub.adapter_folder.code_references import code_references
from minilora_hub.adapter_folder.tasks import is_own_auto_map, own_auto_map
from minilora_hub.publish.checks.problems import Folder, Problem

REBUILD = "build the folder again with this version of minilora_hub: minilora push does"
RUNNERS = {"eval", "exec", "compile", "__import__"}


def check_code_files(folder: Folder) -> Iterator[Problem]:
    """Find code files that differ from this version's, and check what they import and call."""
    endpoint = endpoint_files(folder.peft_layout)
    ours = endpoint if folder.peft_layout else remote_code_files() | endpoint
    for name in folder.files:
        if not name.endswith((".py", ".pyc", ".pyd", ".so", ".dll")) and name != REQUIREMENTS:
            continue
        if folder.peft_layout and name not in ours:
            yield Problem("code-differs", name, "is code, and an adapter in PEFT's layout needs none", "remove it")
        elif name in ours:
            found = hashlib.sha256(folder.files[name].read_bytes()).digest()
            if found == hashlib.sha256(ours[name].read_bytes()).digest():
                continue
            yield Problem("code-differs", name, "differs from this version's file of that name", REBUILD)
        yield from _check_source(folder, name)


@cache
def allowed_imports() -> frozenset[str]:
    """Return the top-level modules that this version's remote code imports."""
    found: set[str] = set()
    for path in remote_code_files().values():
        found.update(_imported(ast.parse(path.read_text(encoding="utf-8"))))
    return frozenset(found)


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


def _check_source(folder: Folder, name: str) -> Iterator[Problem]:
    if not name.endswith(".py"):
        return
    try:
        tree = ast.parse(folder.files[name].read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        yield Problem("code-syntax", name, f"is not Python: {error}", REBUILD)
        return
    for module in sorted(set(_imported(tree)) - allowed_imports()):
        message = f"imports {module}, which the code of an adapter does not need"
        yield Problem("code-imports", name, message, REBUILD)
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    for runner in sorted(called & RUNNERS):
        yield Problem("code-imports", name, f"calls {runner}(), which can run any code", REBUILD)


def check_auto_map(folder: Folder) -> Iterator[Problem]:
    """Check that only config.json refers to code, and only to this repo's own classes."""
    expected = None if folder.peft_layout else own_auto_map(folder.config.get("model_type"))
    if expected and not is_own_auto_map(folder.config.get("auto_map"), folder.config.get("model_type")):
        message = f"auto_map={str(folder.config.get('auto_map'))[:200]}: must be like {expected}"
        yield Problem("auto-map", "config.json", message, REBUILD)
    for reference in code_references(folder.path):
        if not reference.own:
            message = f"{reference.text}: loading it would run code that is not the adapter's"
            remedy = "remove the entry; a tokenizer with code of its own cannot be published"
            yield Problem("auto-map", reference.file, message, remedy)
