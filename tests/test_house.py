"""The shape of the house: levels, lazy imports, the island's rules, and the README against the tree."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minilora_hub
from minilora_hub.remote_code.adapter_files import CODE_FILES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minilora_hub"
ISLAND = PACKAGE / "remote_code"

# In this order: a room imports only rooms before it. `minilora_hub/__init__.py` has lazy names and comes last.
ROOMS = (
    "errors",
    "quiet",
    "code_inputs",
    "progress_display",
    "documents",
    "seeds",
    "whole_folders",
    "formatting",
    "remote_code",
    "hub",
    "bases",
    "adapter_folder",
    "integrations",
    "formats",
    "integrations.vllm",
    "recording",
    "compare",
    "training",
    "integrations.flower",
    "evaluation",
    "publish",
    "serving",
    "demo",
    "cli",
    "__init__",
)


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, inside functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = module_name(path).split(".") if path.name == "__init__.py" else module_name(path).split(".")[:-1]
            package = package[: len(package) - node.level + 1]
            found.add(".".join([*package, node.module or ""]).rstrip("."))
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
IMPORTS = {module: imports_of(path) & MODULES.keys() - {module, "minilora_hub"} for module, path in MODULES.items()}


def room_of(module: str) -> str:
    """The second part of a name. What needs higher rooms, the vLLM plugin and the Flower app, is a room of its own."""
    for room in ("integrations.vllm", "integrations.flower"):
        if f"{module}.".startswith(f"minilora_hub.{room}."):
            return room
    return module.split(".")[1] if "." in module else "__init__"


def test_every_room_has_its_place():
    assert {room_of(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_come_from_rooms_before(module):
    for imported in IMPORTS[module]:
        here, there = room_of(module), room_of(imported)
        assert here == there or ROOMS.index(there) < ROOMS.index(here), f"{module} imports {imported}"


def test_no_import_cycles():
    done, open_ = set(), []

    def visit(module):
        if module in open_:
            pytest.fail(f"import cycle: {' -> '.join([*open_[open_.index(module) :], module])}")
        if module not in done:
            open_.append(module)
            for imported in sorted(IMPORTS[module]):
                visit(imported)
            open_.pop()
            done.add(module)

    for module in sorted(IMPORTS):
        visit(module)


@pytest.mark.parametrize("module", ["minilora_hub", "minilora_hub.cli", "minilora_hub.bases"])
def test_importing_loads_no_torch(module):
    code = f"import {module}, sys; print([m for m in ('torch', 'transformers', 'gradio', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_sorted_and_there():
    names = [name for name in minilora_hub.__all__ if name != "__version__"]
    assert names == sorted(names)
    assert all(getattr(minilora_hub, name) is not None for name in names)
    assert set(names) <= set(dir(minilora_hub))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        minilora_hub.nothing  # noqa: B018
    stub = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {a.asname for n in ast.walk(stub) if isinstance(n, ast.ImportFrom) for a in n.names if a.asname}
    assert typed == set(names)


# ---- the island ----


def test_the_islands_files_are_the_ones_that_travel():
    assert {path.name for path in ISLAND.glob("*.py")} - {"__init__.py"} == set(CODE_FILES)


@pytest.mark.parametrize("name", CODE_FILES)
def test_the_island_depends_on_little(name):
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub"} | set(sys.stdlib_module_names)
    for imported in imports_of(ISLAND / name):
        assert imported.startswith("minilora_hub.remote_code.") or imported.split(".")[0] in allowed


def test_transformers_finds_every_island_file_from_each_entry():
    """Its loader reads `from .x import` lines with a regular expression, and copies what it finds."""
    for entry in ("modeling_minilora", "configuration_minilora"):
        seen, queue = set(), [entry]
        while queue:
            name = queue.pop()
            seen.add(name)
            source = (ISLAND / f"{name}.py").read_text(encoding="utf-8")
            found = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", source, flags=re.MULTILINE))
            assert all((ISLAND / f"{other}.py").exists() for other in found), found
            assert not re.findall(r"^\s*(?:import\s+\.|from\s+\.\s+import)", source, flags=re.MULTILINE)
            queue += found - seen
    assert {f"{name}.py" for name in seen} <= set(CODE_FILES)


# ---- what ships ----


def test_shipped_adapters_carry_this_versions_code():
    names = {path.name for path in (ROOT / "model_cards").iterdir()}
    assert names == {f"smollm2-135m-{method}" for method in ("lora", "dora", "mixlora", "mixdora")}
    # A LoRA is published in PEFT's format, which needs no code.
    assert {path.name for path in (ROOT / "model_cards" / "smollm2-135m-lora").glob("*.py")} == set()
    for folder in (ROOT / "model_cards" / name for name in names - {"smollm2-135m-lora"}):
        assert not (folder / "adapter_config.json").exists()
        for name in CODE_FILES:
            ours, theirs = ((where / name).read_bytes() for where in (ISLAND, folder))
            assert hashlib.sha256(ours).digest() == hashlib.sha256(theirs).digest(), f"{folder.name}/{name}"


def test_spaces_folder_is_no_package():
    """With an __init__.py it would shadow the `spaces` package that ZeroGPU needs."""
    assert not (ROOT / "spaces" / "__init__.py").exists()


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=lambda folder: folder.name)
def test_shipped_cards_are_what_the_code_renders(folder):
    """A change of the template, the results or the code in the folder shows here as a card that has drifted."""
    from minilora_hub.publish.card.merging import merge_cards
    from minilora_hub.publish.card.render import render_card

    card = (folder / "README.md").read_text(encoding="utf-8")
    rendered = render_card(folder, repo_id=f"minilora-hub/{folder.name}", previous=card)
    assert card == merge_cards(card, None, []).noted_in(rendered)


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=lambda folder: folder.name)
def test_shipped_adapters_pass_every_check(folder):
    from minilora_hub.publish.checks.folder import check_folder

    problems = check_folder(folder, base_exists=lambda *_: True, base_license=lambda *_: "apache-2.0")
    assert [problem for problem in problems if problem.blocking] == []


@pytest.fixture(scope="module")
def isolated():
    """One process for all that are verified."""
    from minilora_hub.publish.verify.isolated_process import IsolatedProcess

    with IsolatedProcess() as process:
        yield process


@pytest.mark.slow
@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=lambda folder: folder.name)
def test_shipped_adapters_verify(folder, isolated):
    """Loaded through AutoModel in an isolated process, against the logits recorded when they were built."""
    from minilora_hub.publish.verify.verify import verify

    report = verify(folder, base_model="embedded", progress=False, process=isolated)
    assert report.ok, report.problem
