"""Workers of threads that have computed: whoever computes step by step keeps its own, others let theirs go."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_stand_ins as tiny
import torch

from minilora_hub.compare.engine import CompareEngine, Sampling
from minilora_hub.compare.openmp_workers import release_workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP library is that of Linux")


@pytest.fixture
def thread():
    """A thread that computes with two threads, as a server's threads do on two cores."""
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.set_num_threads, 2).result()
        yield pool
    torch.set_num_threads(before)


def computed():
    """Compute something that takes two threads; return the threads of the process."""
    assert torch.ones(1 << 20).sin_().sum().item() == pytest.approx(882361.5, rel=1e-3)
    return tasks()


def tasks():
    return {int(task) for task in os.listdir("/proc/self/task")}


def without(names, before):
    """The threads that have come since, besides those of Python."""
    return names - before - {each.native_id for each in threading.enumerate()}


def test_workers_end_and_come_again(thread):
    before = tasks()
    workers = without(thread.submit(computed).result(), before)
    assert workers
    thread.submit(release_workers).result()
    assert not workers & tasks()
    again = without(thread.submit(computed).result(), before)
    assert again
    assert not workers & again


@pytest.mark.parametrize("step", [False, True])
def test_whoever_holds_the_models_once_leaves_no_workers(thread, step):
    engine = CompareEngine(tiny.tiny_llama(), tokenizer=tiny.byte_tokenizer())

    def hold():
        with engine.exclusive(step=step):
            return computed()

    before = tasks()
    workers = without(thread.submit(hold).result(), before)
    assert workers
    assert bool(workers & tasks()) is step


def test_a_stream_leaves_no_workers_when_it_ends(thread):
    engine = CompareEngine(tiny.tiny_llama(), tokenizer=tiny.byte_tokenizer())

    def stream():
        during = set()
        for _ in engine.stream("Hi.", Sampling(3)):
            during |= computed()
        return during

    before = tasks()
    workers = without(thread.submit(stream).result(), before)
    assert workers
    assert not workers & tasks()
