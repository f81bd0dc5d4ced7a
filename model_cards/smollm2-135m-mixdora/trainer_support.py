"""What transformers' Trainer, and tools built on it, ask of a model beyond its outputs.

They read the arguments of `forward` to decide which columns of a data set to keep, look for a checkpoint's weights
under fixed file names, hand over state dicts whose names carry the prefixes of wrappers, and take the class's name for
whether labels are to be shifted.
"""

import functools
import inspect
import re
import types

import torch
from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .adapter_files import write_adapter

CHECKPOINT_FOLDER = re.compile(r"checkpoint-\d+")
CHECKPOINT_FILE = "model.safetensors"
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
"""Names under which torch.compile, FSDP, checkpointing and DDP hold the module they wrap."""


class takes_base_arguments:  # noqa: N801  (a decorator)
    """A `forward` whose signature, seen from an instance, is that of the base's, with its own arguments added.

    The class's `forward` is the function itself.
    """

    def __init__(self, function):
        self.function = function
        functools.update_wrapper(self, function)

    def __get__(self, model, owner=None):
        if model is None:
            return self.function
        if torch.compiler.is_compiling():  # which finds a bound method again by reading `forward`
            return functools.partial(self.function, model)
        return types.MethodType(_described(self.function, type(model.base)), model)


@functools.cache
def _described(function, base_class):
    """A copy of a model's `forward` that shows the base's signature; a function, as torch.compile requires."""
    model, *ours = inspect.signature(function).parameters.values()
    theirs = list(inspect.signature(base_class.forward).parameters.values())[1:]
    names = {parameter.name for parameter in theirs}
    added = [p for p in ours if p.kind is p.KEYWORD_ONLY and p.name not in names]
    copied = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    functools.update_wrapper(copied, function)
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__signature__ = inspect.Signature([model, *sorted((*theirs, *added), key=lambda p: p.kind)])
    return copied


def by_name(forward, args, kwargs):
    """The arguments of a call of `forward`, a bound method, by name.

    Raises:
        TypeError: there are too many, or one is given twice.
    """
    parameters = inspect.signature(forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(args) > len(names):
        raise TypeError(f"forward takes at most {len(names)} positional arguments, got {len(args)}")
    given = dict(zip(names, args, strict=False))
    twice = sorted(given.keys() & kwargs.keys())
    if twice:
        raise TypeError(f"forward got {', '.join(twice)} both by position and by name")
    return {**given, **kwargs}


def without_wrappers(name):
    """A parameter's name without the parts that wrappers add: ``_orig_mod.base.x`` is ``base.x``."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def find_in_state_dict(names, state_dict):
    """The names under which a state dict holds parameters: {parameter's name: name in the state dict}.

    Args:
        names: names of parameters, which wrappers may have changed in `state_dict`.
        state_dict: what a wrapped model's `state_dict()` gave.

    Raises:
        ValueError: one is missing.
    """
    held = {without_wrappers(name): name for name in state_dict}
    missing = [name for name in names if without_wrappers(name) not in held]
    if missing:
        raise ValueError(
            f"state_dict: {missing[0]} is missing ({len(missing)} of the adapter's {len(names)} tensors are); "
            "it must hold every parameter of the adapter"
        )
    return {name: held[without_wrappers(name)] for name in names}


def write_checkpoint(folder, tensors):
    """In a folder of Trainer's checkpoints, write the adapter's tensors where Trainer looks for a model's weights.

    Trainer resumes and takes the best model from that file only, through `load_state_dict`. In any other folder, one
    that Trainer has copied there is removed: the adapter's own file is what is published.

    Args:
        folder: a pathlib.Path.
        tensors: {parameter's name, with the wrappers' prefixes: tensor}.
    """
    path = folder / CHECKPOINT_FILE
    if CHECKPOINT_FOLDER.fullmatch(folder.name):
        write_adapter(path, tensors)
    elif path.is_file() and _names_in(path) == {without_wrappers(name) for name in tensors}:
        path.unlink()


def _names_in(path):
    """Names of the tensors in a safetensors file, without the wrappers' prefixes; none where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {without_wrappers(name) for name in file.keys()}  # noqa: SIM118  (safe_open is not a mapping)
    except SafetensorError:
        return set()


def shift_labels_of(model_class):
    """Tell Trainer that this class is a causal language model, whose labels it must shift under label smoothing.

    It goes by a table of class names, to which registering with the Auto classes adds nothing.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(model_class.config_class.model_type, model_class.__name__)
