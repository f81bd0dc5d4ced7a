"""Serves pages on request, several in one process, so that Gradio and torch are imported once.

Reads a JSON object from each line of stdin and answers with one line: ``{"serve": name, **arguments}`` starts a page
and gets its address, with ``openai`` a stage that has OpenAI's API too; ``{"forwards": address}`` gets the number of
forwards that its engine has computed.
"""

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from demo.measured import measured as measured_file
from demo.serving import STAGE_ADAPTERS
from processes import free_port
from tiny_stand_ins import ScriptedBase, byte_tokenizer, save_parrots

from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.compare.found_adapters import shipped_adapters
from minilora_hub.demo.adapters.from_hub import LinkedAdapters
from minilora_hub.demo.openai_api import openai_arguments
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.scheduled import page_scheduler
from minilora_hub.demo.ui.app import build_demo, launch
from minilora_hub.demo.votes.voted_answers import VotedAnswersFile

PARROTS = {"parrot-dora": "dora", "parrot-mix": "mixlora"}
EXAMPLES = ["Hello 👋 there", "Ünïcödé"]


def scripted(scratch: Path, delay=0.03, **limits):
    """Build a page over a base that never ends and two parrots."""
    engine = CompareEngine(ScriptedBase(delay), save_parrots(scratch, PARROTS), tokenizer=byte_tokenizer())
    title = "Same prompt, three answers"
    return engine, build_demo(
        engine, title=title, examples=EXAMPLES, limits=PageLimits(**limits), data=scratch / "data"
    )


def social(scratch: Path, data: str, training: bool = False):
    """Build the same page with data on disk and a folder of adapters to choose from; `training` stores voted texts."""
    engine = CompareEngine(ScriptedBase(delay=0.01), save_parrots(scratch, PARROTS), tokenizer=byte_tokenizer())
    (scratch / "allowed").mkdir()
    save_parrots(scratch / "allowed", {"spare-dora": "dora", "spare-mix": "mixlora"})
    base = ResolvedBase("scripted", scratch, hub_id="org/scripted", revision=None, embedded=False)
    return engine, build_demo(
        engine,
        links=LinkedAdapters(engine, base),
        examples=EXAMPLES,
        max_new_tokens=32,
        data=Path(data),
        allowed=[scratch / "allowed"],
        voted=VotedAnswersFile(Path(data) / "training", "embedded") if training else None,
    )


def stage(scratch: Path, folder: str, route: str | None = None, limits: dict | None = None):
    """Build a page over a tiny random base and an adapter of each kind, slowed down so that one can watch it."""
    adapters = [Path(folder) / name for name in STAGE_ADAPTERS]
    engine = CompareEngine(Path(folder) / "base", adapters, device="cpu", keep_bare_logits=True)
    engine.bank.model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
    scheduler = page_scheduler(engine, PageLimits(**(limits or {})))
    options = {"route": Path(route) if route else None, "scheduler": scheduler}
    page = build_demo(engine, examples=["Hello", "Why?"], max_new_tokens=40, data=scratch / "data", **options)
    return engine, page, scheduler


def measured(scratch: Path, out: str):
    """Build a page over parrots, with measured answers."""
    folders = save_parrots(scratch, PARROTS)
    engine = CompareEngine(ScriptedBase(delay=0.01), folders, tokenizer=byte_tokenizer())
    file = Path(out) / "measured.json"
    file.write_text(json.dumps(measured_file(dict(zip(PARROTS, map(Path, folders), strict=True)))))
    return engine, build_demo(engine, max_new_tokens=16, data=scratch / "data", measured=file)


def shipped(scratch: Path):
    """Build the page that `minilora demo` serves: the shipped adapters on the embedded base."""
    engine = CompareEngine("embedded", shipped_adapters())
    return engine, build_demo(engine, data=scratch / "data")


def main() -> None:
    """Answer until stdin ends."""
    engines = {}
    with TemporaryDirectory() as folder:
        for line in sys.stdin:
            request = json.loads(line)
            if address := request.get("forwards"):
                answer = engines[address].forwards
            else:
                scratch = Path(folder) / str(len(engines))
                scratch.mkdir()
                mcp, build = request.pop("mcp", False), globals()[request.pop("serve")]
                key = request.pop("openai", None)
                engine, demo, *scheduler = build(scratch, **request)
                openai = None if key is None else openai_arguments(*scheduler, key)
                answer = launch(
                    demo, host="127.0.0.1", port=free_port(), block=False, mcp=mcp, openai=openai, engine=engine
                )
                engines[answer] = engine
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
