"""Run one base with many adapters of any kind, each row of a batch with its own: a base layer runs once for all rows.

    bank = AdapterBank(base)
    bank.register("poet", "adapters/poet")           # tensors are not read yet
    bank.load("coder", "author/coder-dora")          # read and checked
    with bank.use(["poet", "coder"]), bank.rows([None, "poet", "poet", "coder"]):
        logits = bank.model(input_ids).logits        # (4, seq, vocabulary): row 0 is the bare base

LoRA, DoRA, MixLoRA and MixDoRA, of different ranks and targets, can be mixed. Thousands can be registered: a bounded
pool keeps the most recently used in memory, and the others are read from their files when a row needs them, as in
S-LoRA on a GPU (arXiv 2311.03285).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora_hub.adapter_folder.folders import adapter_facts, naming, read_source
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.compare.bank_entries import BankEntry, BankMemory, tensor_bytes, version_of
from minilora_hub.compare.banked_layers import BankedBlock, BankedExperts, BankedLinear, BatchRows, LinearUpdate
from minilora_hub.compare.found_adapters import shared_copy
from minilora_hub.compare.one_row_norms import speed_up_norms
from minilora_hub.errors import AdapterError
from minilora_hub.formats.reading import read_adapter
from minilora_hub.remote_code.adapted_linear import LowRankUpdate
from minilora_hub.remote_code.attach import build_modules
from minilora_hub.remote_code.base_loading import settle_quantization
from minilora_hub.remote_code.few_rows import remember_weights
from minilora_hub.remote_code.fused_experts import AdaptedExperts
from minilora_hub.remote_code.linear_layers import keep_4bit_weights_exact, linear_shape, plain_weight
from minilora_hub.remote_code.mixture import MixtureOfLoraExperts
from minilora_hub.remote_code.routed_linear import RoutedLinear

BankedLayer = BankedLinear | BankedBlock | BankedExperts


class AdapterBank:
    """Adapters on one base, chosen per row.

    Args:
        base: a loaded causal language model. It is not changed: the bank runs a copy that shares its tensors.
        limit: maximum bytes of adapter tensors in memory, enforced when an adapter is loaded or used again. Adapters in
            use are kept even above it. None: loaded adapters are never evicted.

    Attributes:
        model: the model to call inside `rows`, with transformers' forward signature.
    """

    def __init__(self, base: nn.Module, *, limit: int | None = None) -> None:
        """Prepare the base; the bank has no adapters yet."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit!r}: must be a number of bytes of at least 1, or None")
        self.model = shared_copy(base).eval()
        self._plain = shared_copy(base).eval()  # without adapters; new adapters are planned and checked on it
        for model in (self.model, self._plain):
            keep_4bit_weights_exact(model)
        remember_weights(self.model)
        self._modules = dict(self.model.named_modules())  # by path in the unwrapped base
        self._rows = BatchRows()
        self._limit = limit
        self._entries: dict[str, BankEntry] = {}
        # The least recently used first.
        self._loaded: OrderedDict[str, list[BankedLayer]] = OrderedDict()
        # One entry per use; removal from a list is atomic, so any thread may do it.
        self._in_use: list[str] = []
        self._kept: list[str] = []
        self._base_bytes = tensor_bytes(self.model)
        self._wrapped: dict[str, BankedLayer] = {}
        for path, module in self._modules.items():
            if plain_weight(module) is not None:  # this also makes rows of the bare base faster
                self._linear(path)
        speed_up_norms(self.model)

    # ---- registration and loading ----

    def register(self, name: str, folder: str | Path) -> BankEntry:
        """Register an adapter. Its configuration is read now, its tensors when a row first needs it.

        Args:
            name: its name in rows. It must not be registered already: `unload` it first.
            folder: our format (``config.json``) or PEFT's LoRA (``adapter_config.json``).

        Raises:
            AdapterError: the folder holds no adapter of a known kind.
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"name={name!r}: an adapter of this name is registered; unload it first")
        entry = BankEntry(name, Path(folder), adapter_facts(Path(folder)))
        self._entries[name] = entry
        return entry

    def load(self, name: str, folder: str | Path | None = None) -> BankEntry:
        """Load an adapter into memory, and register it first if a folder is given.

        Raises:
            AdapterError: it is not registered, its folder holds no adapter of a known kind, it is damaged, or it does
                not fit the base; the message names the tensor or the field. The bank is then unchanged.
            ValueError: the name is taken.
        """
        if folder is not None:
            self.register(name, folder)
        try:
            self._load(name)
        except Exception:
            if folder is not None:
                del self._entries[name]
            raise
        return self._entries[name]

    def unload(self, name: str) -> None:
        """Remove an adapter and free its memory.

        Raises:
            AdapterError: it is not registered.
            ValueError: rows are using it, or wait for it.
        """
        self._entry(name)
        if name in self._kept:
            raise ValueError(f"name={name!r}: rows are using this adapter, or wait for it; end them first")
        self._drop(name)
        del self._entries[name]

    def list(self) -> list[BankEntry]:
        """Return every registered adapter, in the order of registration. Thread-safe."""
        return [*self._entries.values()]

    def find(self, name: str) -> BankEntry | None:
        """Return an adapter by its name; None if it is not registered."""
        return self._entries.get(name)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """{path: (out_features, in_features)} of every linear of the base, the head included."""
        found = ((path, linear_shape(module)) for path, module in self._plain.named_modules())
        return {path: shape for path, shape in found if shape}

    def memory(self) -> BankMemory:
        """Report the memory in use."""
        return BankMemory(self._base_bytes, sum(entry.bytes for entry in self.list()), self._limit)

    def make_room(self) -> None:
        """Evict the least recently used adapters that no row uses until the limit is met; the latest one stays.

        Loading an adapter does this too. Call it in the thread that runs rows.
        """
        if self._limit is None:
            return
        size = sum(self._entries[name].bytes for name in self._loaded)
        for name in [*self._loaded][:-1]:
            if size <= self._limit:
                return
            if name not in self._in_use:
                size -= self._entries[name].bytes
                self._drop(name)

    # ---- running rows ----

    @contextmanager
    def keep(self, name: str) -> Iterator[None]:
        """Keep an adapter from being unloaded inside the `with` block; it may leave the memory. Thread-safe."""
        self._kept.append(name)
        try:
            yield
        finally:
            self._kept.remove(name)

    @contextmanager
    def use(self, names: Sequence[str | None]) -> Iterator[None]:
        """Keep these adapters in memory inside the `with` block; they are loaded if necessary. None is the bare base.

        Raises:
            AdapterError: one is not registered, its folder is missing, or it is damaged or does not fit the base.
        """
        with ExitStack() as held:
            for name in names:
                if name is not None:
                    held.enter_context(self.keep(name))
                    self._load(name)
                    self._in_use.append(name)
                    held.callback(self._in_use.remove, name)
            yield

    @contextmanager
    def rows(self, names: Sequence[str | None], solos: Sequence[int | None] | None = None) -> Iterator[BatchRows]:
        """Run `model` inside the `with` block with these adapters, one name per row; None is the bare base.

        Rows of one adapter should be adjacent: each run of equal names is computed together.

        Args:
            names: the adapter of each row of the batch, all of them held by `use`.
            solos: for each row, the one expert of its MixLoRA that serves it, or None for those of the router.

        Returns:
            The rows, whose `routing` has the routing of each MixLoRA after a forward.

        Raises:
            ValueError: an adapter is not in memory.
        """
        missing = sorted({name for name in names if name is not None and name not in self._loaded})
        if missing:
            raise ValueError(f"names={missing}: not in memory; hold them with use()")
        self._rows.arrange(names, solos)
        self._rows.routing = {}
        try:
            yield self._rows
        finally:
            self._rows.arrange([])

    def check_solo(self, name: str | None, expert: int | None) -> None:
        """Check that an adapter has this expert, in every layer.

        Raises:
            AdapterError: the adapter is not registered.
            ValueError: it has no such expert.
        """
        if expert is None:
            return
        facts = None if name is None else self._entry(name).facts
        experts = 0 if facts is None else min(facts.experts_by_layer, default=facts.experts)
        if not 0 <= expert < experts:
            need = f"from 0 to {experts - 1}" if experts else "None: it has no experts"
            raise ValueError(f"solo_expert={expert!r}: for {name or 'the base'} it must be {need}")

    def adapts_head(self, names: Iterable[str | None]) -> bool:
        """Return whether one of these adapters changes the output embeddings of the model."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return isinstance(head, BankedLinear) and any(name in head.updates for name in {*names} if name is not None)

    # ---- internals ----

    def _entry(self, name: str) -> BankEntry:
        if name not in self._entries:
            raise AdapterError(f"adapter {name!r}: not registered; there are {sorted(self._entries)[:10]}")
        return self._entries[name]

    @torch.inference_mode(False)  # tensors created in inference mode cannot be used outside it
    def _load(self, name: str) -> None:
        entry = self._entry(name)
        if name in self._loaded:
            self._loaded.move_to_end(name)
            self.make_room()  # adapters that were in use when the limit was last enforced may be idle now
            return
        version = version_of(entry.folder)  # before the files are read
        with naming(name):
            config, tensors, sites = read_adapter(read_source(entry.folder), BaseSource.of_model(self._plain))
            if config.base_quantization:  # it makes up for the rounding of its own base
                settle_quantization(self._plain, config)
        modules = build_modules(self._plain, config, sites, tensors, dtype=self._adapter_dtype())
        size = 0
        parts: dict[str, LinearUpdate | RoutedLinear | MixtureOfLoraExperts | AdaptedExperts] = {}
        for site in sites:
            module = modules.pop(site.path)
            if isinstance(module, MixtureOfLoraExperts):
                _compute_scales(module.eval())
                parts[site.path] = module
                own: list[Any] = [
                    module.router,
                    *module.experts.parameters(),
                ]  # without the base's parameters, which are shared
            elif isinstance(module, RoutedLinear):
                parts[site.path] = module.eval()
                own = [module.router, *module.update.parameters()]
            elif isinstance(module, AdaptedExperts):
                parts[site.path] = module.eval()
                own = [*module.updates.parameters()]
            else:
                parts[site.path] = update = LinearUpdate.of(module)
                own = [tensor for tensor in update if isinstance(tensor, torch.Tensor)]
            size += sum(tensor.numel() * tensor.element_size() for tensor in own)
        # Nothing fails from here on, so no adapter is loaded in part.
        layers: list[BankedLayer] = []
        for path, part in parts.items():
            if isinstance(part, (LinearUpdate, RoutedLinear)):
                layers.append(self._linear(path))
                self._linear(path).updates[name] = part
            elif isinstance(part, AdaptedExperts):
                layers.append(self._experts(path))
                self._experts(path).adapted[name] = part
            else:
                layers.append(self._block(path, part))
                self._block(path, part).mixtures[name] = part
        self._loaded[name] = layers
        facts = adapter_facts(entry.folder)  # read again, as the folder may have changed
        self._entries[name] = BankEntry(name, entry.folder, facts, size, version)
        self.make_room()

    def _adapter_dtype(self) -> torch.dtype | None:
        """Return the base's dtype, quicker than changing it per layer; float32 on a CPU: see `product_dtype`."""
        first = next((p for p in self._plain.parameters() if p.is_floating_point()), None)
        if first is None:
            return None
        return torch.float32 if first.is_cpu and first.dtype is torch.bfloat16 else first.dtype

    def _drop(self, name: str) -> None:
        for layer in self._loaded.pop(name, ()):
            held = {BankedLinear: "updates", BankedExperts: "adapted", BankedBlock: "mixtures"}[type(layer)]
            getattr(layer, held).pop(name)
        entry = self._entries[name]
        self._entries[name] = BankEntry(name, entry.folder, entry.facts, version=entry.version)

    def _linear(self, path: str) -> BankedLinear:
        """Return the banked linear at `path` of the base, which replaces the plain one on the first call."""
        if path not in self._wrapped:
            self._wrap(path, BankedLinear(self._modules[path], self._rows))
        return self._wrapped[path]  # type: ignore[return-value]

    def _block(self, path: str, mixture: MixtureOfLoraExperts) -> BankedBlock:
        if path not in self._wrapped:
            for name in (*mixture.structure.inputs, mixture.structure.output):
                self._linear(f"{path}.{name}")
            self._wrap(path, BankedBlock(self._modules[path], mixture.structure, self._rows))
        return self._wrapped[path]  # type: ignore[return-value]

    def _experts(self, path: str) -> BankedExperts:
        if path not in self._wrapped:
            self._wrap(path, BankedExperts(self._modules[path], self._rows))
        return self._wrapped[path]  # type: ignore[return-value]

    def _wrap(self, path: str, wrapper: BankedLayer) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._modules[parent], name, wrapper)
        self._wrapped[path] = wrapper


@torch.no_grad()
def _compute_scales(mixture: MixtureOfLoraExperts) -> None:
    """Compute DoRA's c of every expert, which inference keeps, ahead of the first token."""
    for name, update in mixture.experts.items():
        if isinstance(update, LowRankUpdate) and update.magnitude is not None:
            update.scale(mixture.base_block.get_submodule(name))
