"""The queue: the order, the positions, and the estimates, against a simulation; and the limits of a page."""

from __future__ import annotations

import random

import pytest
from demo.threads import run_async

from minilora_hub.demo.runs.limits import VARIABLES, PageLimits, flag, whole_number
from minilora_hub.demo.runs.runner import waiting_words
from minilora_hub.demo.runs.waiting_queue import Waiting, WaitingQueue, steps_until_start


def simulated(running, before, places):
    """Count single steps of those who take turns, until one who came last gets a place."""
    left, waiting, count = list(running), [*before, None], 0
    while True:
        while waiting and len(left) < places:
            newcomer = waiting.pop(0)
            if newcomer is None:
                return count
            left.append(newcomer)
        left = [steps - 1 for steps in left]  # a round: one step each
        count += len(left)
        left = [steps for steps in left if steps > 0]


@pytest.mark.parametrize("seed", range(20))
def test_the_estimate_is_what_taking_turns_needs(seed):
    """Against a simulation step by step."""
    draw = random.Random(seed)
    places = draw.randint(1, 5)
    running = [draw.randint(1, 60) for _ in range(places)]
    before = [draw.randint(1, 60) for _ in range(draw.randint(0, 6))]
    assert steps_until_start(running, before, places) == simulated(running, before, places)


def test_there_is_no_wait_while_places_are_free():
    assert steps_until_start([5], [], 2) == 0
    assert steps_until_start([], [], 1) == 0


def test_first_come_first_served():
    """Places go in the order of arrival; one who leaves gives the place to the next."""

    async def scene():
        queue = WaitingQueue(2, 10)
        tickets = [queue.join(10) for _ in range(5)]
        assert running(tickets) == [True, True, False, False, False]
        assert [queue.waiting(ticket).position for ticket in tickets[2:]] == [1, 2, 3]
        queue.leave(tickets[3])
        assert queue.waiting(tickets[4]).position == 2
        queue.leave(tickets[0])
        assert running([tickets[2], tickets[4]]) == [True, False]
        await tickets[2].wait(0)
        await tickets[4].wait(0.01)
        for ticket in (*tickets, *tickets):  # leaving twice takes no other's place
            queue.leave(ticket)
        assert len(queue) == 0
        assert running([queue.join(1) for _ in range(3)]) == [True, True, False]

    run_async(scene())


def running(tickets):
    return [ticket.running.is_set() for ticket in tickets]


def test_the_queue_is_bounded():
    async def scene():
        queue = WaitingQueue(1, 2)
        for _ in range(3):
            queue.join(5)
        with pytest.raises(ValueError, match="the queue is full, with 2 waiting: try again in some minutes"):
            queue.join(5)

    run_async(scene())


def test_seconds_come_from_measured_steps():
    """None before anything was measured; then steps that are left times the time of a step."""

    async def scene():
        queue = WaitingQueue(1, 10)
        first, second, third = queue.join(100), queue.join(40), queue.join(10)
        assert queue.waiting(third) == Waiting(2, None)
        queue.stepped(first, 10, 2.0)
        assert queue.waiting(second) == Waiting(1, pytest.approx(90 * 0.2))
        assert queue.waiting(third) == Waiting(2, pytest.approx(130 * 0.2))

    run_async(scene())


def test_answers_that_end_early_shorten_the_estimate():
    """Answers that use a tenth of the steps asked for let the next one start sooner."""

    async def scene():
        queue = WaitingQueue(1, 10)
        for _ in range(60):
            ticket = queue.join(100)
            queue.stepped(ticket, 10, 1.0)
            queue.leave(ticket, finished=True)
        first, second = queue.join(100), queue.join(100)
        assert queue.waiting(second).seconds == pytest.approx(10 * 0.1, rel=0.1)
        queue.stepped(first, 50, 5.0)  # longer than answers usually are: it may end at any time
        assert queue.waiting(second).seconds == pytest.approx(0.1)

    run_async(scene())


@pytest.mark.parametrize(
    ("waiting", "words"),
    [
        (Waiting(1, None), "Number 1 in the queue."),
        (Waiting(2, 0.2), "Number 2 in the queue: starting in about 1 s."),
        (Waiting(3, 41.4), "Number 3 in the queue: starting in about 41 s."),
        (Waiting(30, 400), "Number 30 in the queue: starting in about 7 min."),
    ],
)
def test_words(waiting, words):
    assert waiting_words(waiting) == words


# ---- limits ----


def test_limits_from_variables(monkeypatch):
    """Each variable sets its field; unset and empty ones leave the default."""
    for name, variable in VARIABLES.items():
        for other in VARIABLES.values():
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(variable, "3")
        assert PageLimits.from_environment() == PageLimits(**{name: 3})
        monkeypatch.setenv(variable, "")
        assert PageLimits.from_environment() == PageLimits()
    monkeypatch.setenv("MINILORA_MAX_WAITING", "0")
    assert PageLimits.from_environment().waiting == 0


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "½", "٣", " 4"])
def test_a_variable_that_is_no_number_is_named(monkeypatch, value):
    monkeypatch.setenv("MINILORA_MAX_TOKENS", value)
    with pytest.raises(ValueError, match=f"MINILORA_MAX_TOKENS='{value}': must be a whole number of at least 1"):
        PageLimits.from_environment()
    with pytest.raises(ValueError, match="at least 1"):
        whole_number("MINILORA_MAX_TOKENS", 1)


def test_too_many_at_once():
    with pytest.raises(ValueError, match="at_once=100 and waiting=100: must be at most 150 together"):
        PageLimits(at_once=100, waiting=100)


def test_switches(monkeypatch):
    for text, value in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("MINILORA_MCP", text)
        assert flag("MINILORA_MCP") is value
    monkeypatch.setenv("MINILORA_MCP", "yes")
    with pytest.raises(ValueError, match="MINILORA_MCP='yes': must be 0 or 1"):
        flag("MINILORA_MCP")
