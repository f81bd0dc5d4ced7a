"""The Space: the comparison page over the shipped adapters.

MINILORA_BASE       the base model: "embedded" (the default), a folder, or an id on the Hub
MINILORA_ADAPTERS   adapter folders or ids on the Hub, separated by commas; default: those under model_cards/
"""

from __future__ import annotations

import os

from minilora_hub.compare.columns import shipped_adapters
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.demo.ui import build_demo, launch


def main() -> None:
    """Load the models, then serve the page until the process ends."""
    base = os.environ.get("MINILORA_BASE") or "embedded"
    named = [name.strip() for name in os.environ.get("MINILORA_ADAPTERS", "").split(",") if name.strip()]
    engine = CompareEngine(base, named or shipped_adapters(), progress=print)
    launch(build_demo(engine))


if __name__ == "__main__":
    main()
