"""The command line, `minilora`: parse, delegate, print.

    app.py         the commands together; exit codes and errors
    shared.py      options and output that several commands use
    demo.py        demo
    publishing.py  push, verify, card
    finding.py     info, list, pull
    training.py    train, sweep
    evaluating.py  eval

Heavy imports happen inside the commands, so that `--help` is instant.
"""

from minilora_hub.cli.app import main as main
