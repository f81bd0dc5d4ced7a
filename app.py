"""The Space: the comparison page over the shipped adapters.

MINILORA_BASE       the base model: "embedded" (the default), a folder, or an id on the Hub
MINILORA_ADAPTERS   adapter folders or ids on the Hub, separated by commas; default: those under model_cards/

A link with ``?adapter=owner/name`` shows that public adapter beside the base. What such links may cost:

MINILORA_LINK_MEGABYTES   the weights of one adapter, at most; default: 200
MINILORA_LINK_ADAPTERS    how many of them are kept in memory; default: 4
"""

from __future__ import annotations

import os

from minilora_hub.bases import resolve_base
from minilora_hub.compare.columns import shipped_adapters
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.demo.linked import Limits, LinkedAdapters
from minilora_hub.demo.ui import build_demo, launch


def main() -> None:
    """Load the models, then serve the page until the process ends."""
    base = os.environ.get("MINILORA_BASE") or "embedded"
    named = [name.strip() for name in os.environ.get("MINILORA_ADAPTERS", "").split(",") if name.strip()]
    limits = Limits.from_environment()
    engine = CompareEngine(base, named or shipped_adapters(), progress=print)
    launch(build_demo(engine, links=LinkedAdapters(engine, resolve_base(base), limits)))


if __name__ == "__main__":
    main()
