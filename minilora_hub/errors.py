"""Every error that minilora_hub raises on purpose.

    MiniLoraError
    ├── BaseModelError      a base model cannot be found, fetched or read
    ├── AdapterError        an adapter folder or repo is incomplete, damaged or of another kind
    ├── PublishError        a push, or a look at the Hub, failed; the message says what the repo is like now
    ├── TrainingError       a training run cannot start, or had to stop; the message says what is kept
    │   ├── DataError             training data cannot be used; the message names file and line
    │   └── TrainingInterrupted   a signal stopped it, after a checkpoint was saved
    ├── PageError           what a visitor of the page asked for cannot be done; the message says why
    ├── ServingError        a request to the OpenAI-compatible server cannot be answered; it holds the HTTP status
    └── MissingExtraError   an optional package is not installed; the message names the extra

The files under `remote_code/` are copied into published repos and must not import this package: they raise plain
`ValueError`s. The command line prints the message of either in one line and exits with code 1.
"""

from __future__ import annotations


class MiniLoraError(Exception):
    """Base class: catch this to catch everything below."""


class BaseModelError(MiniLoraError):
    """A base model cannot be found, fetched or read. The message says what to install or pass."""


class AdapterError(MiniLoraError):
    """An adapter folder or repo is incomplete, damaged, or not an adapter of a known kind."""


class PublishError(MiniLoraError):
    """A push or a look at the Hub failed. The message says what the repo is like now, and what to do."""


class TrainingError(MiniLoraError):
    """A training run cannot start, or had to stop. The message says why, and what is kept."""


class DataError(TrainingError):
    """Training data cannot be used. The message names file and line."""


class TrainingInterrupted(TrainingError):  # noqa: N818  it is no mistake
    """A signal stopped a training run, which saved a checkpoint first.

    Args:
        message: what was saved and how to go on.
        signal_number: the signal, e.g. 2 for Ctrl-C.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class PageError(MiniLoraError):
    """What a visitor of the page asked for cannot be done. The message is for the visitor."""


class ServingError(MiniLoraError):
    """A request to the OpenAI-compatible server cannot be answered. The message is for the client.

    Args:
        status: the HTTP status, e.g. 404.
        message: the reason, with what is required.
        param: the field of the request that the reason is about.
        code: OpenAI's word for the reason, e.g. ``"model_not_found"``.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class MissingExtraError(MiniLoraError):
    """An optional package is not installed.

    Args:
        package: the module that could not be imported, e.g. ``"gradio"``.
        extra: the extra of minilora_hub that brings it, e.g. ``"demo"``.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed. It comes with: pip install 'minilora_hub[{extra}]'")
        self.package = package
        self.extra = extra
