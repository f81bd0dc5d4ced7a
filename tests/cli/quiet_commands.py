"""Run as a script: commands of ours, one after the other in this process, and what each prints that is not ours.

Reads ``[[name, arguments], …]`` from the file that is named first, and writes ``{name: {"code", "ours", "foreign"}}``
to the second. Stderr says that it is a terminal, as some bars are drawn on one only. What comes through tqdm,
`logging` or `warnings`, or from C code, is not ours.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

FOREIGN = {"logging", "tqdm", "warnings"}


class Terminal:
    """Stands for sys.stderr or sys.stdout: the calls that lead to a write tell whose text it is."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.ours, self.foreign = [], []

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # which is how click finds out that it is a stream of text
            raise TypeError(text)
        frame, kind = sys._getframe(1), self.ours
        while frame is not None:
            if type(frame.f_locals.get("self")).__name__ == "DownloadBar":
                kind = self.ours
                break
            if frame.f_globals.get("__name__", "").partition(".")[0] in FOREIGN:
                kind = self.foreign
            frame = frame.f_back
        kind.append(text)
        if "Open http" in text:  # the page is served: end it as Ctrl-C does
            signal.setitimer(signal.ITIMER_REAL, 1.0)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def run(commands: list[tuple[str, list[str]]], raw: Path) -> dict[str, dict]:
    """Run them; `raw` is the file that C code and children write to when they write to stderr."""
    from minilora_hub.cli import main

    said = {}
    for name, arguments in commands:
        start = raw.stat().st_size
        sys.stdout, sys.stderr = printed, terminal = Terminal(), Terminal()
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        foreign = [*printed.foreign, *terminal.foreign, raw.read_bytes()[start:].decode()]
        ours = "".join(terminal.ours)
        said[name] = {"code": code, "ours": ours, "foreign": [text for text in foreign if text.strip()]}
    return said


def main() -> None:
    commands = json.loads(Path(sys.argv[1]).read_text())
    signal.signal(signal.SIGALRM, interrupt)
    raw, real = Path(sys.argv[2]).with_suffix(".raw"), os.dup(2)
    with raw.open("wb") as file:
        os.dup2(file.fileno(), 2)
        try:
            said = run(commands, raw)
        finally:
            os.dup2(real, 2)
    Path(sys.argv[2]).write_text(json.dumps(said))


if __name__ == "__main__":
    main()
