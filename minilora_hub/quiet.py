"""Silence other libraries: their progress bars, log messages and deprecation warnings.

    with quiet_libraries():                     # also a decorator: @quiet_libraries()
        model = AutoModelForCausalLM.from_pretrained(folder)

`quiet_libraries` is for functions that users call in their own process: everything is restored afterwards. The command
line uses `quiet_process`, which imports nothing and also silences libraries that are imported later.

Errors, minilora_hub's own output and UserWarnings, which may be about what the user asked for, are never hidden.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOGGERS = (
    *("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "peft", "torchao", "transformers", "trl"),
    "torch.utils._pytree",  # of torchao's classes, on import
)
VERBOSITY = dict.fromkeys(("DATASETS_VERBOSITY", "HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY"), "error")
"""Read by these libraries when they are imported, to set the levels of their loggers."""
NO_BARS = dict.fromkeys(("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
"""Read in the same way, for the whole process; transformers reads the second one."""
NOTICES = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
TRANSFORMERS = "transformers.utils.logging"

_lock = threading.RLock()
_depth = 0
_undo: dict[str, Callable[[], None]] = {}


@contextmanager
def quiet_process() -> Iterator[None]:
    """Silence the libraries in the whole process, also those that are imported later.

    The user's environment variables and warning options (``python -W``) are kept.
    """
    with quiet_libraries(), warnings.catch_warnings(), _variables(VERBOSITY | NO_BARS):
        if not sys.warnoptions:
            for category in NOTICES:
                warnings.simplefilter("ignore", category)
        yield


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries in a block; calls may be nested, and may come from several threads.

    The bars of a library that is imported inside the block are shown, unless it is entered again.
    """
    global _depth
    counted = 0
    try:
        with _lock:
            _depth += 1
            counted = 1
            for name, silence in _SILENCERS.items():
                if name not in _undo and (undo := silence()) is not None:
                    _undo[name] = undo
        yield
    finally:
        with _lock:
            _depth -= counted
            while not _depth and _undo:  # one by one: after Ctrl-C in an undo, what is left is still silent, and known
                _undo.popitem()[1]()


def _loggers() -> Callable[[], None]:
    before = {name: logging.getLogger(name).level for name in LOGGERS}
    for name, level in before.items():
        logging.getLogger(name).setLevel(max(level, logging.ERROR))

    def undo() -> None:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)

    return undo


def _hub_bars() -> Callable[[], None] | None:
    if "huggingface_hub" not in sys.modules:
        return None
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    # If the user has set the environment variable, the client ignores calls.
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        return None
    disable_progress_bars()
    known = TRANSFORMERS in sys.modules

    def undo() -> None:
        enable_progress_bars()
        if TRANSFORMERS in sys.modules and not known:  # it was imported while the Hub's bars were off
            sys.modules[TRANSFORMERS].enable_progress_bar()

    return undo


def _transformers_bars() -> Callable[[], None] | None:
    """Silence transformers' bars; its own functions would also switch those of huggingface_hub."""
    module = sys.modules.get(TRANSFORMERS)
    if module is None or not module.is_progress_bar_enabled():
        return None
    hook = module.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **(kwargs | {"disable": True})))

    def undo() -> None:
        module.set_tqdm_hook(hook)

    return undo


def _datasets_bars() -> Callable[[], None] | None:
    module = sys.modules.get("datasets.utils.tqdm")
    if module is None or module.HF_DATASETS_DISABLE_PROGRESS_BARS is not None or module.are_progress_bars_disabled():
        return None
    module.disable_progress_bars()
    enable: Callable[[], None] = module.enable_progress_bars
    return enable


_SILENCERS: dict[str, Callable[[], Callable[[], None] | None]] = {
    "loggers": _loggers,
    "huggingface_hub": _hub_bars,
    "transformers": _transformers_bars,
    "datasets": _datasets_bars,
}


@contextmanager
def _variables(wanted: dict[str, str]) -> Iterator[None]:
    """Set environment variables that are not set, for this process and those it starts."""
    new = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)
