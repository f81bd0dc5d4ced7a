"""Swap the adapter of a loaded model for another one, or for none, while a block runs: no second base is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.folders import AdapterFolder
from minilora_hub.formats.reading import read_adapter
from minilora_hub.remote_code.attach import build_modules, replace_module

if TYPE_CHECKING:
    from minilora_hub.bases.skeleton import BaseSource


@contextmanager
def modules_in(base: Any, modules: Mapping[str, Any]) -> Iterator[None]:
    """Put modules into a base, ``{path: module}``, and put back what was there when the block ends."""
    before = {path: base.get_submodule(path) for path in modules}
    for path, module in modules.items():
        replace_module(base, path, module)
    try:
        yield
    finally:
        for path, module in before.items():
            replace_module(base, path, module)


@contextmanager
def bare_base(model: Any) -> Iterator[Any]:
    """Yield the base of an adapted model without its adapter, in eval mode."""
    base, plain = model.base, {}
    for site in model.sites:
        module = base.get_submodule(site.path)
        plain[site.path] = module.base_layer if hasattr(module, "base_layer") else module.base_block
    with modules_in(base, plain):
        training = base.training
        base.eval()
        try:
            yield base
        finally:
            base.train(training)


def frozen_modules(base: Any, source: AdapterFolder, known: BaseSource) -> dict[str, Any]:
    """Build the modules of an adapter over a bare base, without gradients and in eval mode.

    Args:
        base: the base, without an adapter; see `bare_base`.
        source: the adapter's folder, in our format or PEFT's.
        known: the same base, which the adapter is checked against.

    Returns:
        ``{path in the base: module}``; the base is left as it is.

    Raises:
        AdapterError: the adapter does not fit the base.
    """
    config, tensors, sites = read_adapter(source, known)
    modules = build_modules(base, config, sites, tensors)
    for module in modules.values():
        own = ("update", "updates", "experts", "router")  # of a linear, of a base's experts, of a mixture
        for part in (getattr(module, name) for name in own if hasattr(module, name)):
            part.requires_grad_(False)
        module.eval()
    return modules
