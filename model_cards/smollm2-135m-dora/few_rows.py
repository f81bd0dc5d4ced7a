"""Multiply a weight with few rows, as in decoding, in the way that is fastest on this machine.

Decoding reads every weight once per token, so its limit is the speed of the memory, and a matrix library may stay far
below it: on an AMD EPYC with 2 threads, in float32, `F.linear` with one row takes 2.8 times as long as the product with
two rows, which takes as long as reading the weight. In bfloat16 on the same machine `F.linear` is the fastest. So
nothing is assumed: for each dtype, shape, number of rows and number of threads the ways below are timed when they are
first needed, and `F.linear` stays unless another way is clearly faster. The choice holds until the process ends.

    F.linear    x W^T
    transposed  (W x^T)^T
    padded      the same with a row of zeros beside a single row, because two columns are read faster than one
    vector      W x as a product of a matrix and a vector
    blocks      x W^T for a part of W on each thread, because `F.linear` may read W for a single row on one thread

They differ by rounding only, but another process may choose another way. ``MINILORA_PRODUCTS=plain`` in the
environment, or `plain_products` in a part of a program, keeps to `F.linear`: results are then equal in every process.
"""

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from itertools import cycle
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_ROWS = 16
LEAST_VALUES = 2**16  # reading a smaller weight takes less time than starting the product
CLEARLY_FASTER = 0.9  # of the time of F.linear
LEAST_ROUNDS, MOST_ROUNDS, ENOUGH_SECONDS = 3, 25, 0.02  # of timing
SETTING = "MINILORA_PRODUCTS"

_KEEP_PLAIN: ContextVar[bool] = ContextVar("minilora_plain_products", default=False)
_CHOSEN: dict[Any, Callable] = {}
_TIMING = threading.Lock()
_WEIGHTS: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
_BUFFERS = threading.local()


def remember_weights(model: nn.Module) -> None:
    """Have the weights of a model at hand for timing; they are not kept alive."""
    plain = (weight for weight in model.parameters() if not hasattr(weight, "__tensor_flatten__"))  # else no .to()
    large = (weight for weight in plain if weight.dim() == 2 and weight.numel() >= LEAST_VALUES)
    _WEIGHTS.update((id(weight), weight) for weight in large)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, a new tensor, computed in the fastest way.

    Many rows, small weights, other devices than the CPU, autograd, autocast and torch.compile have `F.linear` itself.

    Raises:
        ValueError: the environment variable has an unknown value.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    if not 0 < rows <= MOST_ROWS or not _has_a_choice(x, weight):
        return F.linear(x, weight, bias)
    count = rows if rows <= 8 else MOST_ROWS  # at 9 and more the ways hardly differ by one row
    key = (count, weight.shape, weight.dtype, torch.get_num_threads())
    way = _CHOSEN.get(key) or _choose(key, weight)
    if way is F.linear:
        return F.linear(x, weight, bias)
    out = way(x, weight)
    return out if bias is None else out.add_(bias)


@contextmanager
def plain_products() -> Iterator[None]:
    """Compute with `F.linear` only inside a `with` block, in this thread: for results that are compared to the bit."""
    token = _KEEP_PLAIN.set(True)
    try:
        yield
    finally:
        _KEEP_PLAIN.reset(token)


def _has_a_choice(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _KEEP_PLAIN.get():
        return False
    kind = type(weight)
    return (
        weight.numel() >= LEAST_VALUES
        and x.is_cpu
        and weight.is_cpu
        and x.dtype is weight.dtype
        and type(x) is Tensor
        and (kind is nn.Parameter or kind is Tensor)  # another type may hold its values in another form
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def _transposed(x: Tensor, weight: Tensor) -> Tensor:
    out = torch.mm(weight, x.reshape(-1, x.shape[-1]).t())  # (out, rows)
    return out.t().contiguous().view(*x.shape[:-1], -1)


def _padded(x: Tensor, weight: Tensor) -> Tensor:
    key: Any = (x.shape, weight.shape, weight.dtype)
    row, columns, out, first = _BUFFERS.__dict__.get(key) or _make_buffers(key)
    row.copy_(x)
    torch.mm(weight, columns, out=out)
    return first.clone()


@torch.inference_mode(False)  # so that they can be written to in either mode
def _make_buffers(key: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and both columns of the padded input, both columns of the output and the first, for this thread.

    Making them for each product would take as long as the product of a small weight.
    """
    (*leading, width), (height, _), dtype = key
    rows = torch.zeros(2, width, dtype=dtype, device="cpu")
    out = torch.empty(height, 2, dtype=dtype, device="cpu")
    _BUFFERS.__dict__[key] = rows[0].view(*leading, width), rows.t(), out, out[:, 0].view(*leading, height)
    return _BUFFERS.__dict__[key]


def _vector(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)


def _blocks(x: Tensor, weight: Tensor) -> Tensor:
    count, width = _count_blocks(weight.shape[0], torch.get_num_threads()), weight.shape[1]
    row = x.reshape(1, 1, width).expand(count, 1, width)
    return torch.bmm(row, weight.view(count, -1, width).mT).view(*x.shape[:-1], -1)


@cache
def _count_blocks(height: int, threads: int) -> int:
    """Return into how many equal blocks W is cut, one or a few for each thread; 1 if it can't be cut, or needs not."""
    return next((count for count in range(threads, 4 * threads) if height % count == 0), 1)


def _choose(key: Any, weight: Tensor) -> Callable:
    """Choose the way for this number of rows and weights of this kind, once for the whole process."""
    setting = os.environ.get(SETTING, "")
    if setting not in ("", "plain"):
        raise ValueError(f"{SETTING}={setting!r}: must be 'plain', or not set")
    if setting:
        return F.linear
    with _TIMING:
        if key not in _CHOSEN:
            _CHOSEN[key] = _fastest(key[0], weight)
        return _CHOSEN[key]


def _fastest(count: int, weight: Tensor) -> Callable:
    """Time the ways in turns, and compare the medians of their times relative to `F.linear` in the same round.

    Each call has another weight of this shape, as far as there are any: in a model, a weight leaves the caches between
    two uses.
    """
    ways: list[Callable] = [F.linear, _padded if count == 1 else _transposed]
    if count == 1 and weight.dtype.itemsize >= 4:  # in half precision some libraries also add in half precision
        ways.append(_vector)
        if _count_blocks(weight.shape[0], torch.get_num_threads()) > 1:
            ways.append(_blocks)
    weights = cycle([w for w in [*_WEIGHTS.values()] if _is_alike(w, weight)] or [weight])
    rows = weight.new_ones(count, weight.shape[1])
    seconds: list[list[float]] = [[] for _ in ways]
    began = time.perf_counter()
    for done in range(1 + MOST_ROUNDS):
        if done > LEAST_ROUNDS and time.perf_counter() - began > ENOUGH_SECONDS:
            break
        for way, taken in zip(ways, seconds, strict=True):
            each = next(weights)
            started = time.perf_counter()
            way(rows, each)
            taken.append(time.perf_counter() - started)
        next(weights)  # so that a way has other weights in the next round
    # The first round warms up. Rounds are compared one by one, because other work on the machine comes and goes.
    ratios = [
        statistics.median(own / plain for own, plain in zip(taken[1:], seconds[0][1:], strict=True))
        for taken in seconds
    ]
    best = min(range(len(ways)), key=ratios.__getitem__)
    return ways[best] if ratios[best] < CLEARLY_FASTER else F.linear


def _is_alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype is other.dtype and one.is_cpu and one.is_contiguous()
