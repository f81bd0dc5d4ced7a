"""Votes until it is killed, for the tests of the store: ``vote_writer.py FOLDER NAME`` prints each stored id."""

import sys
from itertools import count
from pathlib import Path

from demo.comparisons import comparison

from minilora_hub.demo.votes.votes import VoteStore, vote_on

store = VoteStore(Path(sys.argv[1]))
for number in count():
    vote = vote_on(comparison(prompt="long " * 2000), f"{sys.argv[2]}-{number}", (0, 1, 2), number % 3)
    store.add(vote)
    print(vote.id, flush=True)
