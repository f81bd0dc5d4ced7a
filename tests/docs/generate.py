"""Write what the docs hold by generation: docs/cli.md from the commands, and every block of figures from result files.

    python tests/docs/generate.py

A block stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``; `figures.BLOCKS` renders it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from docs.figures import BLOCKS  # noqa: E402

CLI = ROOT / "docs" / "cli.md"
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.S)


def pages() -> list[Path]:
    """Return README.md and every page under docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def with_figures(text: str) -> str:
    """Return a page with every block of figures rendered from the result files."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]()}\n\n{found[3]}", text)


def command_line_page() -> str:
    """Return docs/cli.md: typer's own description of every command."""
    command = [sys.executable, "-m", "typer", "minilora_hub.cli.app", "utils", "docs", "--name", "minilora"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return "<!-- written by tests/docs/generate.py -->\n\n" + done.stdout.rstrip() + "\n"


def main() -> None:
    """Write the pages."""
    CLI.write_text(command_line_page(), encoding="utf-8")
    for page in pages():
        text = page.read_text(encoding="utf-8")
        page.write_text(with_figures(text), encoding="utf-8")


if __name__ == "__main__":
    main()
