"""`python -m minilora_hub.cli`: the same as the script `minilora`."""

from minilora_hub.cli import main

main()
