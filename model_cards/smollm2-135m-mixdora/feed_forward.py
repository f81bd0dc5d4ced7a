"""Find a layer's feed-forward block by its structure instead of a list of model names.

It is a module with two or three linears and one activation that, called with hidden states, computes what one of the
three known forms computes. That is checked by calling it, so a block that does something else (a sparse mixture, an
extra normalisation) is refused instead of being adapted wrongly.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .layer_stacks import Shapes, linears_in
from .linear_layers import compute_dtype, layer_device, linear_shape

Form = tuple[tuple[str, ...], str, bool | None, bool]
"""A reading of a block: inputs, output and gate_first of a `FeedForwardStructure`, and whether its dropouts swap."""


class FeedForwardStructure:
    """The linears of a feed-forward block and what happens between them.

    Attributes:
        inputs: names of the projections of the block's input, in the order that `activate` takes their outputs:
            ``(gate, up)``, ``(gate_up,)`` for a fused pair, or ``(up,)`` for a block without a gate.
        output: name of the projection back to the hidden size.
        gate_first: in a fused pair, whether the gate is its first half.
        inner, dropout: what drops values before the output projection (None in most blocks), and after it.
    """

    def __init__(self, form: Form, activation: Callable, dropouts: Sequence[nn.Module] = ()) -> None:
        self.inputs, self.output, self.gate_first, swapped = form
        # The block owns these modules; they are held here without registering them a second time.
        self.activation = activation
        inner, dropout = [*dropouts, None, None][:2][:: 1 if swapped else -1]
        self.inner, self.dropout = inner, dropout or nn.Identity()

    def activate(self, *projected: Tensor) -> Tensor:
        """(…, out) per input projection -> (…, ff). Without gradients the arguments may be written to."""
        if self.gate_first is not None:
            first, second = projected[0].chunk(2, dim=-1)
            projected = (first, second) if self.gate_first else (second, first)
        hidden = self.activation(projected[0])
        if len(projected) > 1:
            up = projected[1]
            # In place where possible: a fresh tensor of this size costs more than the product.
            hidden = hidden * up if torch.is_grad_enabled() else hidden.mul_(up)
        return hidden if self.inner is None else self.inner(hidden)

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        """Compute the whole block from its parts."""
        hidden = self.activate(*(block.get_submodule(name)(x) for name in self.inputs))
        return self.dropout(block.get_submodule(self.output)(hidden))


def find_feed_forward(layer: nn.Module, where: str, known: dict[Any, Form]) -> tuple[str, FeedForwardStructure]:
    """Find the layer's one feed-forward block: (path in the layer, structure)."""
    candidates = []
    for path, module in layer.named_modules():
        if path and len(_direct_linears(module)) in (2, 3) and _takes_hidden_states_only(module):
            structure = _recognise(module, f"{where}.{path}", known)
            if structure is not None:
                candidates.append((path, structure))
    if len(candidates) == 1:
        return candidates[0]
    if paths := [path for path, _ in candidates]:
        raise ValueError(f"{where} has {len(paths)} feed-forward blocks ({paths}), not one")
    blocks = [f"{where}.{path} ({type(m).__name__})" for path, m in layer.named_children() if linears_in(m)]
    raise ValueError(
        f"{where} ({type(layer).__name__}): no feed-forward block of a known form (a gated one, a fused gated "
        f"one, or two linears with an activation between) was found; its blocks are {blocks}"
    )


def _direct_linears(module: nn.Module) -> Shapes:
    return {name: shape for name, child in module.named_children() if (shape := linear_shape(child))}


def _takes_hidden_states_only(module: nn.Module) -> bool:
    """Whether forward has one required argument: attention needs positions or a mask, a feed-forward block does not."""
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in positional for p in parameters) == 1


def _recognise(block: nn.Module, path: str, known: dict[Any, Form]) -> FeedForwardStructure | None:
    """Return the structure of `block`, verified by calling it; None if no known form fits.

    `known` keeps the form per class and shapes, so a deep model is verified once and not in every layer.
    """
    linears = _direct_linears(block)
    others = [(name, child) for name, child in block.named_children() if name not in linears]
    dropouts = [child for _, child in others if isinstance(child, nn.Dropout) and child.p > 0]
    activations: list[Callable] = [
        c for _, c in others if not isinstance(c, nn.Dropout) and not any(True for _ in c.parameters())
    ]
    if not activations:  # a plain function, kept as an attribute
        attributes = vars(block).items()
        activations = [value for name, value in attributes if not name.startswith("_") and callable(value)]
    if len(activations) != 1 or len(dropouts) > 2:
        return None
    signature = (type(block), tuple(linears.items()))
    for form in [known[signature]] if signature in known else _possible_forms(linears, bool(dropouts)):
        structure = FeedForwardStructure(form, activations[0], dropouts)
        if signature in known or _computes_the_same(structure, block, path):
            known[signature] = form
            return structure
    return None


def _possible_forms(linears: Shapes, with_dropout: bool) -> list[Form]:
    """Every reading of the shapes as a known form."""
    forms: list[tuple[tuple[str, ...], str, bool | None]] = []
    for output, (hidden, inner) in linears.items():
        inputs = [name for name in linears if name != output]
        shapes = [linears[name] for name in inputs]
        if len(inputs) == 2 and shapes == [(inner, hidden)] * 2:
            forms += [(tuple(inputs), output, None), (tuple(reversed(inputs)), output, None)]
        if len(inputs) == 1 and shapes == [(2 * inner, hidden)]:
            forms += [((inputs[0],), output, True), ((inputs[0],), output, False)]
        if len(inputs) == 1 and shapes == [(inner, hidden)]:
            forms.append(((inputs[0],), output, None))
    return [(*form, swapped) for form in forms for swapped in (False, True)[: 1 + with_dropout]]


def _mark(slope: float, dropout: nn.Module, args: Any, out: Tensor) -> Tensor:
    """Change the output of a dropout, which in evaluation does nothing wherever it is."""
    return out * torch.linspace(1 - slope, 1 + slope, out.shape[-1], device=out.device, dtype=out.dtype)


@torch.no_grad()
def _computes_the_same(structure: FeedForwardStructure, block: nn.Module, path: str) -> bool:
    """Whether the block, called as a whole, gives what `structure` computes from its parts."""
    first = block.get_submodule(structure.inputs[0])
    device, hidden = layer_device(first), _direct_linears(block)[structure.inputs[0]][1]
    if device.type == "meta":
        raise ValueError(f"{path} lies on the meta device: load the base's weights before adapting it")
    # Deterministic, so that adapting a model does not touch the random state; varied, so that forms differ.
    x = torch.sin(torch.arange(4 * hidden, device=device, dtype=torch.float32))
    x = x.view(1, 4, hidden).to(compute_dtype(first))
    was_training = block.training
    block.eval()
    places = {0.5: structure.inner, -0.5: structure.dropout}
    marks = [d.register_forward_hook(partial(_mark, s)) for s, d in places.items() if isinstance(d, nn.Dropout)]
    try:
        expected, got = block(x), structure(block, x)
    except (TypeError, RuntimeError):  # another signature or other shapes: not this form
        return False
    finally:
        for mark in marks:
            mark.remove()
        block.train(was_training)
    if not isinstance(expected, torch.Tensor) or expected.shape != got.shape:
        return False
    expected, got = expected.float(), got.float()
    return bool((expected - got).abs().max() <= 1e-2 * expected.abs().max())
