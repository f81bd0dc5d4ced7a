"""Check the packages and the device that a run needs, before anything is loaded."""

from __future__ import annotations

import difflib
import os
from importlib.util import find_spec

from minilora_hub.errors import MissingExtraError, TrainingError
from minilora_hub.training.recipes import OURS
from minilora_hub.training.settings import TrainingSettings

# Parts of optimizer names, and the package that provides such an optimizer; the first match counts.
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
"""Variables that accelerate's launcher sets. On CPUs accelerate 1.15 would train whole copies without a word."""


def check_requirements(settings: TrainingSettings) -> None:
    """Check that the packages are installed, and that there is a CUDA device if a setting needs one.

    Raises:
        MissingExtraError: a package is missing; the message names the extra.
        TrainingError: a setting cannot work here; the message says which, and what to pass instead.
    """
    recipe = settings.recipe
    for variable, name in SHARDED.items():
        if os.environ.get(variable, "").lower() == "true":
            raise TrainingError(
                f"{name}: accelerate's is not supported (on CPUs it trains whole copies): launch without it, and pass "
                "--set shard=true, which splits the base with FSDP2, or --quantize nf4"
            )
    if recipe.shard:
        _check_shard(settings)
    for package in ("trl", "datasets"):
        _need(package, "train")
    for name in recipe.report_to:
        if name == "tensorboard" and find_spec("tensorboardX"):
            continue
        _need(name, "report")
    if recipe.quantize:
        _need("bitsandbytes", "quant")
    _check_optimizer(recipe.optimizer)


def _check_shard(settings: TrainingSettings) -> None:
    """Refuse settings that need the whole base in each process."""
    recipe = settings.recipe
    others = {"quantize": recipe.quantize, "objective": settings.objective, "keep": settings.keep}
    for name, value in others.items():
        if value:
            raise TrainingError(
                f"shard=true: {name}={value!r} needs a whole base in each process; leave one of them out"
            )
    if settings.method not in OURS:
        raise TrainingError(f"shard=true: method {settings.method!r} is PEFT's; it works with {', '.join(OURS)}")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise TrainingError(
            "shard=true: there is one process, which would hold all of the base: launch several, e.g. "
            "torchrun --nproc_per_node 2 -m minilora_hub.cli train …"
        )


def _need(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise MissingExtraError(package, extra)


def _check_optimizer(name: str) -> None:
    import torch
    from transformers.training_args import OptimizerNames

    known = [member.value for member in OptimizerNames]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise TrainingError(f"optimizer={name!r}: transformers has no such optimizer; similar: {', '.join(close)}")
    package = next((package for mark, package in OPTIMIZER_PACKAGES.items() if mark in name), None)
    if package == "bitsandbytes":
        _need(package, "quant")
    elif package is not None and find_spec(package) is None:
        raise TrainingError(f"optimizer={name!r} needs the package {package}, which is not installed")
    # bitsandbytes 0.50 has 8-bit states on CPUs, but would replace paged states with ordinary ones and only warn.
    if "paged" in name and not torch.cuda.is_available():
        raise TrainingError(
            f"optimizer={name!r} needs a CUDA device, and there is none: pass {name.removeprefix('paged_')!r} "
            "or adamw_torch"
        )
