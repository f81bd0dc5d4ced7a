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

# A module imports only lower levels, or its own without cycles. The first prefix that fits counts.
LEVELS = {
    "minilora_hub.code_inputs": 0,
    "minilora_hub.hub.download_bar": 0,
    "minilora_hub.errors": 0,
    "minilora_hub.quiet": 0,
    "minilora_hub.adapter_folder.results": 0,
    "minilora_hub.bases.end_tokens": 0,
    "minilora_hub.adapter_folder.tensor_names": 0,
    "minilora_hub.user_folders": 0,
    "minilora_hub.remote_code": 0,
    "minilora_hub.integrations": 1,
    "minilora_hub.bases": 1,
    "minilora_hub.bases.embedded": 1,
    "minilora_hub.bases.gguf": 1,
    "minilora_hub.formats": 1,
    "minilora_hub.recording": 1,
    "minilora_hub.training": 2,
    "minilora_hub.compare": 3,
    "minilora_hub.evaluation": 3,  # it measures all adapters of a run over compare's bank
    "minilora_hub.publish": 3,
    "minilora_hub.demo": 4,
    "minilora_hub.cli": 5,
    "minilora_hub": 0,  # its names are lazy
}


def tracked(pattern: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if (ROOT / name).exists()]


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports_of(path: Path, runtime_only: bool = False) -> set[str]:
    """Modules of ours that a file imports, inside functions too, but not under TYPE_CHECKING."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
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


def level_of(module: str) -> int:
    return next(level for prefix, level in LEVELS.items() if module == prefix or module.startswith(prefix + "."))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    if module == "minilora_hub":
        return
    for imported in imports_of(MODULES[module]) & MODULES.keys():
        assert level_of(imported) <= level_of(module), f"{module} (L{level_of(module)}) imports {imported}"


def test_no_import_cycles():
    graph = {module: imports_of(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    graph["minilora_hub"] = set()  # lazy
    done, open_ = set(), []

    def visit(module):
        if module in open_:
            pytest.fail(f"import cycle: {' -> '.join([*open_[open_.index(module) :], module])}")
        if module not in done:
            open_.append(module)
            for imported in sorted(graph[module]):
                visit(imported)
            open_.pop()
            done.add(module)

    for module in sorted(graph):
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


# ---- the README ----

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_quick_start_holds_exactly_two_commands():
    section = README.split("## Quick start")[1].split("\n## ")[0]
    commands = "\n".join(re.findall(r"```bash\n(.*?)\n```", section, re.S)).splitlines()
    assert len(commands) == 2
    assert commands[0].endswith("minilora demo")
    assert commands[1].endswith("python -m pytest")


def test_the_map_names_every_module_and_folder():
    tree = README.split("## The map")[1].split("```")[1]
    named = {line.strip().split()[0].rstrip("/") for line in tree.strip().splitlines()}
    for path in tracked("minilora_hub/*"):
        parts = path.split("/")
        if parts[1] in ("py.typed",):
            continue
        assert parts[1] in named, f"{path} is not on the README's map"
        if parts[1] == "remote_code" and parts[2] != "__init__.py":
            assert parts[2] in named, f"{path} is not on the README's map"
    stems = {Path(path).name for path in tracked("*")} | {part for path in tracked("*") for part in path.split("/")}
    for name in named:
        assert name.split("/")[-1] in stems, f"the README's map names {name}, which does not exist"


def test_links_in_the_readme_point_to_files():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=lambda folder: folder.name)
def test_shipped_cards_are_what_the_code_renders(folder):
    """A change of the template, the results or the code in the folder shows here as a card that has drifted."""
    from minilora_hub.publish.card.render import render_card

    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == render_card(folder, repo_id=f"minilora-hub/{folder.name}", previous=card)


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=lambda folder: folder.name)
def test_shipped_adapters_pass_every_check(folder):
    from minilora_hub.publish.checks.folder import check_folder

    problems = check_folder(folder, base_exists=lambda *_: True, base_license=lambda *_: "apache-2.0")
    assert [problem for problem in problems if problem.blocking] == []


@pytest.mark.parametrize("folder", sorted((ROOT / "model_cards").iterdir()), ids=lambda folder: folder.name)
def test_shipped_adapters_verify(folder):
    """Loaded through AutoModel in a clean process, against the logits recorded when they were built."""
    command = [sys.executable, "-m", "minilora_hub.cli", "verify", str(folder), "--base", "embedded"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
