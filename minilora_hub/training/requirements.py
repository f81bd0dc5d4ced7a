"""What a run needs from this machine, asked before anything is loaded: packages, CUDA."""

from __future__ import annotations

import os
from importlib.util import find_spec

from minilora_hub.errors import MissingExtraError, TrainingError
from minilora_hub.training.settings import TrainingSettings

# What an optimizer's name says about the package it comes from, the first that fits.
OPTIMIZER_PACKAGES = {
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
    "anyprecision": "torchdistx",
    "torch_4bit": "torchao",
    "torch_8bit": "torchao",
    "bnb": "bitsandbytes",
    "8bit": "bitsandbytes",
    "paged": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "lion": "bitsandbytes",
}
SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""What accelerate's launcher says in the environment. On CPUs it would then quietly train whole copies (1.15)."""


def check_requirements(settings: TrainingSettings) -> None:
    """Raise if a package is missing, or if a setting needs CUDA and there is none.

    Raises:
        MissingExtraError: a package is missing; the message names the extra.
        TrainingError: a setting cannot work here; the message says which, and what to pass instead.
    """
    recipe = settings.recipe
    for variable, name in SHARDED.items():
        if os.environ.get(variable, "").lower() == "true":
            raise TrainingError(
                f"{name}: a base in shards is not supported, each process holds all of it: launch without it, and "
                "pass --quantize nf4 where the base is too large"
            )
    for package in ("trl", "datasets"):
        _need(package, "train")
    for name in recipe.report_to:
        if name == "tensorboard" and find_spec("tensorboardX"):
            continue
        _need(name, "report")
    if recipe.quantize:
        _need("bitsandbytes", "quant")
    _check_optimizer(recipe.optimizer)


def _need(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise MissingExtraError(package, extra)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _check_optimizer(name: str) -> None:
    import difflib

    from transformers.training_args import OptimizerNames

    known = [member.value for member in OptimizerNames]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise TrainingError(f"optimizer={name!r}: transformers has none of that name; close are {', '.join(close)}")
    package = next((package for mark, package in OPTIMIZER_PACKAGES.items() if mark in name), None)
    if package == "bitsandbytes":
        _need(package, "quant")
    elif package is not None and find_spec(package) is None:
        raise TrainingError(f"optimizer={name!r} needs the package {package}, which is not installed")
    # bitsandbytes 0.50 has 8-bit states on CPUs; in place of paged ones it would take ordinary ones, with a warning.
    if "paged" in name and not _has_cuda():
        raise TrainingError(
            f"optimizer={name!r} needs a CUDA device, and there is none: pass {name.removeprefix('paged_')!r} "
            "or adamw_torch"
        )
