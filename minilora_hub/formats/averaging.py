"""Mean of adapters that started from the same one, as federated training needs it.

The mean of the updates B A is taken, not of the factors: mean(B) mean(A) contains products of one adapter's B with
another's A. M = sum_i w_i B_i A_i is [w_1 B_1, w_2 B_2, …] times [A_1; A_2; …], whose rank may be the sum of the
ranks. An SVD brings it back to the adapters' rank r, with the smallest possible error in the Frobenius norm. It works
on the QR decompositions of both stacks, B = Q_b R_b and Aᵀ = Q_a R_a: the SVD is that of the small R_b R_aᵀ, and M is
never made.

Everything that is not a factor is averaged as it is: DoRA's magnitudes, routers, whole modules. Experts are averaged
one by one, which is meaningful since all adapters started with the same experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from minilora_hub.adapter_folder.reading import check_values
from minilora_hub.errors import AdapterError


def mean_of_adapters(
    adapters: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> tuple[dict[str, Tensor], float]:
    """Return the weighted mean of adapters with equal settings, and what is lost by keeping their rank.

    Args:
        adapters: {name: tensor}, in our format or PEFT's; stacks of experts are [experts, r, in] and [experts, out, r].
        weights: of the adapters; they are divided by their sum.

    Returns:
        {name: tensor} with the shapes and dtypes of the first adapter, and the residual ‖M - B A‖ / ‖M‖ in the
        Frobenius norm over all updates together, each before its scaling.

    Raises:
        AdapterError: a weight is not above 0, or names, shapes or values of an adapter are wrong.
    """
    first = adapters[0]
    if len(weights) != len(adapters) or not all(0 < weight < math.inf for weight in weights):
        raise AdapterError(f"weights={list(weights)}: must be one number above 0 for each of {len(adapters)} adapters")
    for number, adapter in enumerate(adapters):
        _check_like(first, adapter, number)
    shares = [weight / math.fsum(weights) for weight in weights]
    means: dict[str, Tensor] = {}
    lost = whole = 0.0
    for name, tensor in first.items():
        if "lora_B" in name:
            continue  # with its A
        if "lora_A" not in name:
            parts = [share * adapter[name].double() for share, adapter in zip(shares, adapters, strict=True)]
            means[name] = torch.stack(parts).sum(0).to(tensor.dtype)
            continue
        other = name.replace("lora_A", "lora_B")
        all_a, all_b = [adapter[name] for adapter in adapters], [adapter[other] for adapter in adapters]
        lora_a, lora_b, singular = all_a[0], all_b[0], None
        if not (_all_equal(all_a) and _all_equal(all_b)):  # otherwise the mean is each of them, to the byte
            scaled = [share * b.double() for share, b in zip(shares, all_b, strict=True)]
            rank = lora_a.shape[-2]
            lora_a, lora_b, singular = truncated_product(scaled, [a.double() for a in all_a], rank)
            missing = rank - lora_a.shape[-2]  # where the linear has fewer rows or columns
            lora_a, lora_b = pad(lora_a, (0, 0, 0, missing)), pad(lora_b, (0, missing))
            lost, whole = lost + float(singular[..., rank:].square().sum()), whole + float(singular.square().sum())
        else:
            a, b = lora_a.double(), lora_b.double()
            whole += float(((b.mT @ b) * (a @ a.mT)).sum())  # ||B A||^2, without the whole matrix
        means[name], means[other] = lora_a.to(all_a[0].dtype), lora_b.to(all_b[0].dtype)
    return means, math.sqrt(lost / whole) if whole else 0.0


def truncated_product(all_b: Sequence[Tensor], all_a: Sequence[Tensor], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the closest update of a rank to the sum of B_i A_i.

    Args:
        all_b: each B, [..., out, r_i].
        all_a: each A, [..., r_i, in].
        rank: of the result.

    Returns:
        A [..., rank, in] with orthonormal rows, B [..., out, rank], and all singular values of the sum, the largest
        first. The rank is smaller where a matrix has fewer rows or columns. A's rows are orthonormal also where a
        singular value is 0, so that what is trained next can use the whole rank.
    """
    q_b, r_b = torch.linalg.qr(torch.cat([*all_b], -1))  # (out, n), (n, sum of r)
    q_a, r_a = torch.linalg.qr(torch.cat([*all_a], -2).mT)  # (in, n), (n, sum of r)
    u, singular, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    lora_a = vh[..., :rank, :] @ q_a.mT  # (rank, in)
    lora_b = q_b @ (u[..., :rank] * singular[..., None, :rank])  # (out, rank)
    return lora_a, lora_b, singular


def _all_equal(tensors: Sequence[Tensor]) -> bool:
    return all(torch.equal(tensors[0], tensor) for tensor in tensors)


def _check_like(first: Mapping[str, Tensor], adapter: Mapping[str, Tensor], number: int) -> None:
    if differing := sorted(first.keys() ^ adapter.keys()):
        raise AdapterError(f"adapter {number}: {differing[0]} is not in all adapters")
    for name, tensor in adapter.items():
        if tensor.shape != first[name].shape:
            shape, need = tuple(tensor.shape), tuple(first[name].shape)
            raise AdapterError(f"adapter {number}: {name} has shape {shape}, that of the first has {need}")
        check_values(f"adapter {number}: {name}", tensor)
