"""The lock that streams and the server's scheduler share."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

from minilora_hub.compare.fair_lock import FairLock

TURNS, THREADS = 60, 3


def test_threads_that_ask_again_at_once_take_turns():
    lock, order, inside = FairLock(), [], []
    start = threading.Barrier(THREADS)

    def run(name: int) -> None:
        start.wait()
        for _ in range(TURNS):
            with lock:
                inside.append(name)
                assert len(inside) == 1
                order.append(name)
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=run, args=[name]) for name in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(order) == TURNS * THREADS
    # While all of them ask, none gets the lock twice in a row, unless the others were not woken up in time.
    begin = max(order.index(name) for name in range(THREADS))
    end = min(len(order) - order[::-1].index(name) for name in range(THREADS))
    shared = order[begin:end]
    assert len(shared) > TURNS
    assert sum(first == second for first, second in pairwise(shared)) <= len(shared) / 10


def test_an_exception_inside_gives_it_back():
    lock = FairLock()
    for _ in range(2):
        try:
            with lock:
                raise ValueError
        except ValueError:
            pass
    with lock:
        pass
