"""A page over a scripted base and two parrots, with data on disk: for the tests of votes, links, history, batches.

    python social_page.py PORT DATA

Answers ``forwards`` on stdin with the engine's counter.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tiny_stand_ins import ScriptedBase, byte_tokenizer, save_parrots

from minilora_hub.bases import ResolvedBase
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.demo.adapters.from_hub import LinkedAdapters
from minilora_hub.demo.ui.app import build_demo, launch


def main() -> None:
    """Serve, and answer until stdin ends."""
    port, data = sys.argv[1:]
    with TemporaryDirectory() as scratch:
        parrots = save_parrots(Path(scratch), {"parrot-dora": "dora", "parrot-mix": "mixlora"})
        (Path(scratch) / "allowed").mkdir()
        save_parrots(Path(scratch) / "allowed", {"spare-dora": "dora", "spare-mix": "mixlora"})
        engine = CompareEngine(ScriptedBase(delay=0.01), parrots, tokenizer=byte_tokenizer())
        base = ResolvedBase("scripted", Path(scratch), hub_id="org/scripted", revision=None, embedded=False)
        demo = build_demo(
            engine,
            links=LinkedAdapters(engine, base),
            examples=["Hello 👋 there", "Ünïcödé"],
            max_new_tokens=32,
            data=Path(data),
            allowed=[Path(scratch) / "allowed"],
        )
        print(launch(demo, host="127.0.0.1", port=int(port), block=False), flush=True)
        for line in sys.stdin:
            if line.strip() == "forwards":
                print(engine.forwards, flush=True)


if __name__ == "__main__":
    main()
