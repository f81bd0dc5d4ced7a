"""A page over a tiny base and one adapter of its own that follows links to the Hub of HF_ENDPOINT.

    python linked_page.py PORT BASE ADAPTER

Answers ``kept`` on stdin with the adapters that are in memory, and ``modules`` with the loaded modules of remote code.
"""

import sys
from pathlib import Path

from minilora_hub.bases import resolve_base
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.demo.adapters.from_hub import LinkedAdapters
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.ui.app import build_demo, launch


def main() -> None:
    """Serve, and answer until stdin ends."""
    port, base, adapter = sys.argv[1:]
    engine = CompareEngine(base, [Path(adapter)], device="cpu")
    links = LinkedAdapters(engine, resolve_base(base), PageLimits(link_megabytes=0.1, link_adapters=2))
    print(launch(build_demo(engine, links=links), host="127.0.0.1", port=int(port), block=False), flush=True)
    for line in sys.stdin:
        if line.strip() == "kept":
            print(*(name for name in NAMES if links.get(name)), sep=",", flush=True)
        if line.strip() == "modules":
            print(*(name for name in sys.modules if "transformers_modules" in name), sep=",", flush=True)


NAMES = [f"ana/{name}" for name in ("dora", "mixlora", "lora", "evil")]

if __name__ == "__main__":
    main()
