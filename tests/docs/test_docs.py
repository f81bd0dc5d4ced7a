"""README and docs: their generated parts, their links, the map, the Quick start."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from docs import generate

ROOT = generate.ROOT
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*generate.pages(), ROOT / "CONTRIBUTING.md", ROOT / "spaces" / "compare" / "README.md"]


@pytest.mark.parametrize("page", generate.pages(), ids=lambda page: page.name)
def test_figures_are_those_of_the_result_files(page):
    """If not: python tests/docs/generate.py."""
    text = page.read_text(encoding="utf-8")
    assert generate.with_figures(text) == text


def test_the_command_line_page_is_what_the_commands_say():
    """If not: python tests/docs/generate.py."""
    assert generate.CLI.read_text(encoding="utf-8") == generate.command_line_page()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_files(page):
    text = page.read_text(encoding="utf-8")
    for target in [*re.findall(r"\]\((?!http)([^)#]+)\)", text), *re.findall(r'<img src="(?!http)([^"]+)"', text)]:
        assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(README.splitlines()) <= 150
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in README, page.name


def test_quick_start_holds_exactly_two_commands():
    section = README.split("## Quick start")[1].split("\n## ")[0]
    commands = "\n".join(re.findall(r"```bash\n(.*?)\n```", section, re.S)).splitlines()
    assert len(commands) == 2
    assert commands[0].endswith("minilora demo")
    assert commands[1].endswith("python -m pytest")


def test_the_map_names_every_room():
    tree = README.split("## Repository layout")[1].split("```")[1]
    named = {name.rstrip("/") for name in re.findall(r"(?:^|\s)([\w.]+(?:/|\.py)) ", tree)}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    rooms = {Path(path).parts[1] for path in listed if path.startswith("minilora_hub/")}
    assert rooms - {"__init__.py", "py.typed"} <= named
    for name in named:
        assert name in rooms or (ROOT / name).exists(), f"the map names {name}, which does not exist"
