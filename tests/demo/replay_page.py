"""The page as `minilora demo` serves it: the shipped adapters on the embedded base.

    python replay_page.py PORT

Answers ``forwards`` on stdin with the engine's counter.
"""

import sys

from minilora_hub.compare.engine import CompareEngine
from minilora_hub.compare.found_adapters import shipped_adapters
from minilora_hub.demo.ui.app import build_demo, launch


def main() -> None:
    """Serve, and answer until stdin ends."""
    engine = CompareEngine("embedded", shipped_adapters())
    print(launch(build_demo(engine), host="127.0.0.1", port=int(sys.argv[1]), block=False), flush=True)
    for line in sys.stdin:
        if line.strip() == "forwards":
            print(engine.forwards, flush=True)


if __name__ == "__main__":
    main()
