"""Find the lists of layers in a base that adapters go into, by its structure instead of a list of model names.

The layers of a language model are the one list of modules that is as long as the configuration says and holds linear
layers. An encoder-decoder has two lists, and an adapter goes into both.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .linear_layers import linear_shape

Shapes = dict[str, tuple[int, int]]
Stacks = dict[str, tuple[str, nn.ModuleList]]


def linears_in(layer: nn.Module) -> Shapes:
    """{path in the layer: (out_features, in_features)} of every linear of a decoder layer, in the layer's own order."""
    return {path: shape for path, module in layer.named_modules() if (shape := linear_shape(module))}


def find_layer_stacks(base: Any, towers: Any = None) -> Stacks:
    """Return the lists of layers that adapters go into: {canonical name: (path in the base, layers)}.

    Without `towers`, a language model's are called ``layers``, whatever the base calls them, and those of an
    encoder-decoder ``encoder.layers`` and ``decoder.layers``. With `towers` they have their paths in the base without
    its head.

    Raises:
        ValueError: there is none, or there are several and nothing says which; the message has their paths.
    """
    if towers is not None:
        return _chosen_lists(base, towers)
    parts = _encoder_and_decoder(base)
    if not parts:
        return {"layers": find_decoder_layers(base)}
    stacks = {}
    for name, part in parts.items():
        found = outermost_lists(part)
        if len(found) != 1:
            raise ValueError(
                f"base {type(base).__name__}: its {name} must have one list of layers with linears; "
                f"it has {list(found)}"
            )
        prefix = next(path for path, module in base.named_modules() if module is part)
        path, layers = next(iter(found.items()))
        stacks[f"{name}.layers"] = (f"{prefix}.{path}", layers)
    return stacks


def is_dual_encoder(base: Any) -> bool:
    """Whether a base compares texts with images or sounds, as CLIP does: neither of its towers is the main one."""
    return hasattr(base, "get_text_features")


def reads_tokens(base: nn.Module, path: str) -> bool:
    """Whether the part of a base that a module is in takes token ids, rather than a picture or a sound."""
    around = [base, *(base.get_submodule(path.rsplit(".", up)[0]) for up in range(path.count("."), -1, -1))]
    return isinstance(input_embeddings([m for m in around if isinstance(m, PreTrainedModel)][-1]), nn.Embedding)


def input_embeddings(model: Any) -> Any:
    """What a model looks its inputs up in; None where it has nothing of the kind."""
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _chosen_lists(base: Any, towers: Any) -> Stacks:
    prefix = "" if base.base_model is base else f"{base.base_model_prefix}."
    named = {path.removeprefix(prefix): (path, layers) for path, layers in outermost_lists(base).items()}
    wanted = [""] if towers == "all" else towers
    unknown = [tower for tower in wanted if not any(_begins(name, tower) for name in named)]
    if unknown:
        raise ValueError(f"towers={unknown}: no list of layers begins so; the base has {list(named)}")
    return {name: found for name, found in named.items() if any(_begins(name, tower) for tower in wanted)}


def _begins(name: str, tower: str) -> bool:
    return not tower or name == tower or name.startswith(f"{tower}.")


def _encoder_and_decoder(base: Any) -> dict[str, nn.Module]:
    """The two parts of an encoder-decoder; empty for any other base, also for one of the two by itself."""
    if not getattr(base.config, "is_encoder_decoder", False):
        return {}
    parts = {"encoder": base.get_encoder(), "decoder": base.get_decoder()}
    inside = {id(module) for module in base.modules() if module is not base}
    whole = parts["encoder"] is not parts["decoder"] and all(id(part) in inside for part in parts.values())
    return parts if whole else {}


def outermost_lists(part: nn.Module) -> dict[str, nn.ModuleList]:
    """{path: list} of the lists of layers of one class in `part` that all hold linears, without lists inside them."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in part.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{other}.") for other in found):
            continue
        layers = [layer for layer in module if linears_in(layer) and not linear_shape(layer)]
        if len({type(layer) for layer in layers}) == 1 and len(layers) == len(module):
            found[path] = module
    return found


def find_decoder_layers(base: Any) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers of `base`, or of its language model where it has other parts: (path, ModuleList)."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    count = base.config.get_text_config(decoder=True).num_hidden_layers
    lists = [(path, module) for path, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    found = [(path, module) for path, module in lists if len(module) == count and all(linears_in(m) for m in module)]
    inside = {id(module) for module in decoder.modules()}
    found = [item for item in found if id(item[1]) in inside] or found
    if is_dual_encoder(base):
        found = list(outermost_lists(base).items())
    if not found:
        raise ValueError(
            f"base {type(base).__name__}: found no list of {count} decoder layers (config.num_hidden_layers) "
            "with linears in it"
        )
    depth = min(path.count(".") for path, _ in found)
    outermost = [item for item in found if item[0].count(".") == depth]
    if len(outermost) > 1:
        raise ValueError(
            f"base {type(base).__name__}: which list of {count} layers (config.num_hidden_layers) is the language "
            f"model's? It has {[path for path, _ in outermost]}, and its get_decoder() does not tell: pass towers=, a "
            'list of the beginnings of paths, or "all"'
        )
    return outermost[0]
