"""End the OpenMP workers of a thread that has computed, so that those of another thread stay awake."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

PAUSE_SOFT = 1
"""`omp_pause_soft` of OpenMP 5.0: threads end, settings stay, and the next computation makes threads again."""


def release_workers() -> None:
    """End the calling thread's workers; it gets new ones, in about 0.1 ms, when it computes again.

    Every thread that computes with torch has workers of its own, which stay. GNU's OpenMP library lets workers wait
    awake for their next work, but not while there are more of them in the process than processors: then each small
    product waits until the system has woken a worker up. On 2 cores, a product of 2 rows with a 12 x 576 weight took 6
    microseconds, and 150 once a second thread had loaded the models.

    Does nothing where torch was built with another OpenMP library.
    """
    for library in _libraries():
        library.omp_pause_resource_all(PAUSE_SOFT)


@cache
def _libraries() -> list[Any]:
    files = (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")
    loaded = [ctypes.CDLL(str(file)) for file in files]
    return [library for library in loaded if hasattr(library, "omp_pause_resource_all")]
