"""Start an adapter from the rounding of its quantized base, so that base and adapter are near the exact base at once.

Of the exact weight W [out, in] of a linear and the rounded one Q, the start is the best update of rank r

    s B A = argmin || (W - Q - s B A) D ||_F,   D = diag(sqrt(E[x^2])) over the linear's inputs x

With D = I this is LoftQ (arXiv 2310.08659, one iteration); with the second moments of the training rows it is the
diagonal form of QERA (arXiv 2410.06040), which weights each input of the linear by how large it is. By Eckart and Young
s B A = U U^T (W - Q), where the columns of U are the r first left singular vectors of (W - Q) D: nothing is divided by
D, so an input that never differs from zero does no harm.

DoRA's magnitudes become the norms of Q + s B A, so its scale starts at 1; all experts of a mixture get the same update.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora_hub.bases.loading import load_base
from minilora_hub.bases.quantizing import QuantizedFrom
from minilora_hub.bases.resolving import ResolvedBase, resolve_base
from minilora_hub.errors import BaseModelError, TrainingError
from minilora_hub.remote_code.adapter_files import UNKNOWN, base_fingerprint
from minilora_hub.remote_code.base_structure import LinearSite, MixtureSite
from minilora_hub.remote_code.linear_layers import apply_without_bias, linear_shape
from minilora_hub.training.dataset import ExampleRows
from minilora_hub.training.models import compute_dtype
from minilora_hub.training.settings import TrainingSettings

TOKENS = 8192
"""Tokens of the training rows over which moments are computed; rows are taken in an order drawn by the run's seed."""


@dataclasses.dataclass(frozen=True)
class Compensation:
    """What a start makes up for.

    Attributes:
        linears: number of linears that are rounded and adapted.
        before: their error || (W - Q) D ||, relative to || W D ||, over all of them.
        after: the same with the update in place.
    """

    linears: int
    before: float
    after: float

    def described(self, start: str) -> str:
        """Return a line for the plan."""
        return f"{start}: rounding error {self.before:.1%} of the weights, {self.after:.1%} with the update"


@torch.no_grad()
def compensate(model: Any, settings: TrainingSettings, base: ResolvedBase, rows: ExampleRows) -> Compensation:
    """Write the start that `recipe.init` names into a fresh adapter on a quantized base.

    Raises:
        TrainingError: the base is not quantized, or the exact one is not known, or is another one.
    """
    recipe = settings.recipe
    exact = load_base(exact_base(settings, base), dtype=compute_dtype(settings)).eval()
    places = list(_updates(model))
    shapes = {path: _same_shape(exact, path, layer) for path, layer, _ in places}
    moments = {path: torch.ones(width) for path, (_, width) in shapes.items()}
    if recipe.init == "calibrated":
        moments = second_moments(exact, list(shapes), rows, recipe.seed)
    sums = [0.0, 0.0, 0.0]  # of squares: the weights, the error, what is left of it
    linears = 0
    for path, layer, update in places:
        weight, rounded = dense_weight(exact.get_submodule(path)), dense_weight(layer)
        error = weight - rounded
        if not error.any():
            continue
        scale = moments[path].to(error).sqrt()
        rank = min(update.lora_A.shape[-2], *error.shape)
        u = left_singular_vectors(error * scale, rank)
        part = u.T @ error  # [r, in]
        norm = part.norm(dim=1).clamp_min(torch.finfo(part.dtype).tiny)
        root = (norm / update.scaling).sqrt()  # so that a row of A is as large as the column of B
        update.lora_A[..., :rank, :] = (part / norm[:, None] * root[:, None]).to(update.lora_A)
        update.lora_B[..., :rank] = (u * root).to(update.lora_B)
        if update.magnitude is not None:
            update.magnitude.copy_((rounded + u @ part).norm(dim=1))
        left = (error - u @ part) * scale
        for index, values in enumerate((weight * scale, error * scale, left)):
            sums[index] += values.square().sum().item()
        linears += 1
    if not linears:
        raise TrainingError(
            f"init={recipe.init!r}: base {settings.base!r} has the weights of the exact base: write a quantized one "
            "with minilora quantize, and pass it as --base"
        )
    return Compensation(linears, (sums[1] / sums[0]) ** 0.5, (sums[2] / sums[0]) ** 0.5)


def exact_base(settings: TrainingSettings, base: ResolvedBase) -> ResolvedBase:
    """Find the base that a quantized one was made of: the one that is named, or that its config.json names.

    Raises:
        TrainingError: none is named, it is not there, or it has other weights.
    """
    made_of = QuantizedFrom.of(Path(base.path))
    if made_of is None and settings.exact_base is not None:
        return resolve_base(settings.exact_base)
    if made_of is None:
        raise TrainingError(
            f"init={settings.recipe.init!r}: base {settings.base!r} does not say which base it was quantized from: "
            "pass --exact-base ID, or write it with minilora quantize"
        )
    name, revision = (settings.exact_base, None) if settings.exact_base else (made_of.base, made_of.revision)
    try:
        exact = resolve_base(name, revision=revision)
    except BaseModelError as error:
        hint = "" if settings.exact_base else "; pass --exact-base ID if it is elsewhere by now"
        raise TrainingError(f"init={settings.recipe.init!r}: the exact base: {error}{hint}") from error
    fingerprint = base_fingerprint(str(exact.path))
    if UNKNOWN not in (fingerprint, made_of.fingerprint) and fingerprint != made_of.fingerprint:
        raise TrainingError(
            f"init={settings.recipe.init!r}: {name!r} has fingerprint {fingerprint}, and {settings.base!r} was "
            f"quantized from {made_of.fingerprint}: pass that one, or write it again with minilora quantize"
        )
    return exact


@torch.no_grad()
def second_moments(model: Any, paths: list[str], rows: ExampleRows, seed: int) -> dict[str, Tensor]:
    """Return E[x^2] of each linear's inputs over the tokens of the rows: path -> [in], float64."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for path in paths:

        def add(_: Any, given: tuple[Tensor, ...], path: str = path) -> None:
            squares = given[0].flatten(0, -2).double().square().sum(dim=0)
            sums[path] = sums[path] + squares if path in sums else squares

        hooks.append(model.get_submodule(path).register_forward_pre_hook(add))
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)  # noqa: S311  not for security
    tokens = 0
    try:
        for index in order:
            if tokens >= TOKENS:
                break
            ids = rows[index].input_ids[: TOKENS - tokens]
            model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
            tokens += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    if unused := [path for path in paths if path not in sums]:
        raise TrainingError(f"init='calibrated': {unused[0]} is not called on the training rows: pass --init loftq")
    return {path: total / tokens for path, total in sums.items()}


def left_singular_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Return the left singular vectors of the largest singular values: [out, in] -> [out, rank].

    From the smaller Gram matrix in double precision, which is many times faster than the whole decomposition.
    """
    out, width = matrix.shape
    if out <= width:
        return torch.linalg.eigh(matrix @ matrix.T)[1].flip(1)[:, :rank]
    right = torch.linalg.eigh(matrix.T @ matrix)[1].flip(1)[:, :rank]
    return torch.linalg.qr(matrix @ right)[0]


def _same_shape(exact: Any, path: str, layer: Any) -> tuple[int, int]:
    """Return (out, in) of a linear, which has to be the same in the exact base."""
    modules, shape = dict(exact.named_modules()), linear_shape(layer)
    found = linear_shape(modules[path]) if path in modules else None
    if shape is None or found != shape:
        raise TrainingError(f"exact_base: {path} is {found or 'no linear'} in it, and {shape} in the quantized base")
    return shape


def dense_weight(layer: Any) -> Tensor:
    """Return W [out, in] of a linear of any kind, float64, by calling it with the identity."""
    shape = linear_shape(layer)
    assert shape is not None
    return apply_without_bias(layer, torch.eye(shape[1])).T.double()


def _updates(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the path of each adapted linear in the base, the linear, and its update."""
    for site in model.sites:
        module = model.base.get_submodule(site.path)
        if isinstance(site, LinearSite):
            yield site.path, module.base_layer, module.update
        elif isinstance(site, MixtureSite):
            for name, update in module.experts.items():
                yield f"{site.path}.{name}", module.base_block.get_submodule(name), update
