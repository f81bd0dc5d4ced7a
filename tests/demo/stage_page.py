"""A page over a tiny random base and an adapter of each kind, slowed down so that its streaming can be watched.

    python stage_page.py PORT FOLDER

FOLDER is from `save_base_and_adapters`. Answers ``forwards`` on stdin with the engine's counter.
"""

import sys
import time
from pathlib import Path

from minilora_hub.compare.engine import CompareEngine
from minilora_hub.demo.ui.app import build_demo, launch

STEP_SECONDS = 0.03
ADAPTERS = ("lora", "dora", "mix")


def engine_of(folder: Path) -> CompareEngine:
    """The engine of this page; elsewhere it computes the same."""
    return CompareEngine(folder / "base", [folder / name for name in ADAPTERS], device="cpu")


def main() -> None:
    """Serve, and answer until stdin ends."""
    engine = engine_of(Path(sys.argv[2]))
    engine.bank.model.register_forward_pre_hook(lambda *_: time.sleep(STEP_SECONDS))
    demo = build_demo(engine, examples=["Hello", "Why?"], max_new_tokens=40)
    print(launch(demo, host="127.0.0.1", port=int(sys.argv[1]), block=False), flush=True)
    for line in sys.stdin:
        if line.strip() == "forwards":
            print(engine.forwards, flush=True)


if __name__ == "__main__":
    main()
