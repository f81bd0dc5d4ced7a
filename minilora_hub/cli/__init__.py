"""The command line, `minilora`: parse, delegate, print.

    app.py       the root command; exit codes and errors
    options.py   options and output shared by several commands
    demo.py      demo                    compare.py   compare
    train.py     train, sweep            evaluate.py  eval, tasks
    publish.py   push, verify, card      discover.py  info, list, pull
    convert.py   import, export          combine.py   combine, experts
    space.py     space push

Heavy imports happen inside the commands, so that `--help` is fast.
"""

from minilora_hub.cli.app import main as main
