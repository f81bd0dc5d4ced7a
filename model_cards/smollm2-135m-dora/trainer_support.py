"""Support transformers' Trainer, and tools built on it, in what they need from a model beyond its outputs.

They choose the columns of a data set by the arguments of `forward`, look for a checkpoint's weights under fixed file
names, pass state dicts with the prefixes of wrappers, and decide by the class's name whether labels are shifted.
"""

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .adapter_files import write_adapter

CHECKPOINT_FOLDER = re.compile(r"checkpoint-\d+")
CHECKPOINT_FILE = "model.safetensors"
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""Names under which torch.compile, FSDP, checkpointing and DDP hold the module they wrap."""


class takes_base_arguments:  # noqa: N801  (a decorator)
    """A `forward` that an instance shows with the signature of its base's, and its own arguments added.

    The class's `forward` is the function itself.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    def __get__(self, model: Any, owner: Any = None) -> Any:
        if model is None:
            return self.function
        if torch.compiler.is_compiling():  # it reads `forward` again to find a bound method
            return functools.partial(self.function, model)
        base_class: Any = type(model.base)
        return types.MethodType(_described(self.function, base_class), model)


@functools.cache
def _described(function: Any, base_class: Any) -> Any:
    """Copy a model's `forward`, with the base's signature; the copy is a function, as torch.compile requires."""
    model, *ours = inspect.signature(function).parameters.values()
    theirs = list(inspect.signature(base_class.forward).parameters.values())[1:]
    names = {parameter.name for parameter in theirs}
    added = [p for p in ours if p.kind is p.KEYWORD_ONLY and p.name not in names]
    copied = _copied(function)
    copied.__signature__ = inspect.Signature([model, *sorted((*theirs, *added), key=lambda p: p.kind)])
    return copied


def _copied(function: Any) -> Any:
    copied: Any = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    functools.update_wrapper(copied, function)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def shown_with(method: takes_base_arguments, names: Iterable[str]) -> takes_base_arguments:
    """Return a `forward` whose class shows these arguments as well: Trainer finds the labels by them."""
    function = method.function
    shown = _copied(function)
    *parameters, rest = inspect.signature(function).parameters.values()
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    shown.__signature__ = inspect.Signature([*parameters, *added, rest])
    return takes_base_arguments(shown)


def by_name(forward: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of `forward`, a bound method, by name."""
    parameters = inspect.signature(forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(args) > len(names):
        raise TypeError(f"forward takes at most {len(names)} positional arguments, got {len(args)}")
    given = dict(zip(names, args, strict=False))
    twice = sorted(given.keys() & kwargs.keys())
    if twice:
        raise TypeError(f"forward got {', '.join(twice)} both by position and by name")
    return {**given, **kwargs}


def without_wrappers(name: str) -> str:
    """Return a parameter's name without the parts that wrappers add: ``_orig_mod.base.x`` is ``base.x``."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def find_in_state_dict(names: Iterable[str], state_dict: Iterable[str]) -> dict[str, str]:
    """Return {parameter's name: its name in the state dict} of a model that may be wrapped.

    Raises:
        ValueError: one is missing.
    """
    held = {without_wrappers(name): name for name in state_dict}
    names = list(names)
    missing = [name for name in names if without_wrappers(name) not in held]
    if missing:
        raise ValueError(
            f"state_dict: {missing[0]} is missing ({len(missing)} of the adapter's {len(names)} tensors are); "
            "it must hold every parameter of the adapter"
        )
    return {name: held[without_wrappers(name)] for name in names}


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """In a folder of Trainer's checkpoints, write the adapter's tensors where Trainer looks for a model's weights.

    Trainer resumes and loads the best model from that file only, through `load_state_dict`. In any other folder, a copy
    of it that Trainer made is removed: the adapter's own file is what is published. The names of `tensors` have the
    wrappers' prefixes.
    """
    path = folder / CHECKPOINT_FILE
    if CHECKPOINT_FOLDER.fullmatch(folder.name):
        write_adapter(path, tensors)
    elif path.is_file() and _names_in(path) == {without_wrappers(name) for name in tensors}:
        path.unlink()


def _names_in(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file, without wrappers; none where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {without_wrappers(name) for name in file.keys()}  # noqa: SIM118  (safe_open is not a mapping)
    except SafetensorError:
        return set()
