"""One base, many adapters of any kind, each row of a batch with its own: every base layer runs once over all rows.

    bank = AdapterBank(base)
    bank.register("poet", "adapters/poet")           # nothing is read yet
    bank.load("coder", "author/coder-dora")          # read and checked
    with bank.use(["poet", "coder"]), bank.rows([None, "poet", "poet", "coder"]):
        logits = bank.model(input_ids).logits        # (4, seq, vocabulary): row 0 is the bare base

LoRA, DoRA, MixLoRA and MixDoRA, of different ranks and targets, sit side by side. Thousands can be registered: a
bounded pool keeps the most recently used in memory, and the others are read from their files when a row asks for them,
as S-LoRA does on a GPU (arXiv 2311.03285).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora_hub.adapter_folder.folders import AdapterFacts, adapter_facts, naming, read_source
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.compare.banked_layers import BankedBlock, BankedLinear, BatchRows, LinearUpdate
from minilora_hub.compare.found_adapters import shared_copy
from minilora_hub.errors import AdapterError
from minilora_hub.formats.reading import read_adapter
from minilora_hub.remote_code.attach import build_modules
from minilora_hub.remote_code.linear_layers import keep_4bit_weights_exact, linear_shape, plain_weight
from minilora_hub.remote_code.mixture import MixtureOfLoraExperts


@dataclass(frozen=True)
class BankEntry:
    """One registered adapter.

    Attributes:
        name: what rows call it.
        folder: where its files are.
        facts: its kind and size, from its configuration.
        bytes: of its tensors in memory; 0 while it is not loaded.
    """

    name: str
    folder: Path
    facts: AdapterFacts
    bytes: int = 0

    @property
    def loaded(self) -> bool:
        """Whether its tensors are in memory."""
        return self.bytes > 0


@dataclass(frozen=True)
class BankMemory:
    """Bytes of tensors: of the base, and of all adapters that are loaded; and the pool's bound, None without one."""

    base: int
    adapters: int
    limit: int | None


class AdapterBank:
    """Adapters on one base, chosen per row.

    Args:
        base: a loaded causal language model, which is left as it is: the bank runs a copy that shares its tensors.
        limit: the most bytes of adapter tensors to keep in memory. Adapters that rows are using stay, also above it.
            It is held whenever an adapter is loaded.
            None: everything that was ever used stays.

    Attributes:
        model: the model to call inside `rows`, with transformers' forward signature.
    """

    def __init__(self, base: nn.Module, *, limit: int | None = None) -> None:
        """Prepare; no adapter is there yet."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit!r}: must be a number of bytes of at least 1, or None")
        self.model = shared_copy(base).eval()
        self._plain = shared_copy(base).eval()  # never adapted: what adapters are planned and checked against
        for model in (self.model, self._plain):
            keep_4bit_weights_exact(model)
        self._modules = dict(self.model.named_modules())  # by path, also after wrappers took their places
        self._rows = BatchRows()
        self._limit = limit
        self._entries: dict[str, BankEntry] = {}
        self._loaded: OrderedDict[str, list[BankedLinear | BankedBlock]] = (
            OrderedDict()
        )  # the least recently used first
        self._in_use: list[str] = []  # once a holder; threads may let go at any time, which a list does in one piece
        self._base_bytes = _tensor_bytes(self.model)
        self._wrapped: dict[str, BankedLinear | BankedBlock] = {}
        for path, module in self._modules.items():
            if plain_weight(module) is not None:  # the bare base's rows gain too
                self._linear(path)

    # ---- which adapters there are ----

    def register(self, name: str, folder: str | Path) -> BankEntry:
        """Make an adapter known. Its configuration is read; its tensors are read when a row first asks for it.

        Args:
            name: what rows will call it. A name that is taken is an error: `unload` it first.
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
        """Bring an adapter into memory, and register it first where a folder is given.

        Raises:
            AdapterError: it is not registered, its folder holds no adapter of a known kind, it is damaged, or it does
                not fit the base; the message names the tensor or the field. The bank is then as it was.
            ValueError: the name is taken.
        """
        if folder is not None:
            self.register(name, folder)
        try:
            self._bring(name)
        except Exception:
            if folder is not None:
                del self._entries[name]
            raise
        return self._entries[name]

    def unload(self, name: str) -> None:
        """Forget an adapter and free its memory.

        Raises:
            AdapterError: it is not registered.
            ValueError: rows are using it.
        """
        self._entry(name)
        if name in self._in_use:
            raise ValueError(f"name={name!r}: rows are using this adapter; end them first")
        self._drop(name)
        del self._entries[name]

    def list(self) -> list[BankEntry]:
        """Every registered adapter, in the order of registration; any thread may ask while another loads."""
        return [*self._entries.values()]

    def find(self, name: str) -> BankEntry | None:
        """Return an adapter by its name; None where none of this name is registered."""
        return self._entries.get(name)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """{path: (out_features, in_features)} of every linear of the base, the head included."""
        found = ((path, linear_shape(module)) for path, module in self._plain.named_modules())
        return {path: shape for path, shape in found if shape}

    def memory(self) -> BankMemory:
        """Report what is held in memory."""
        return BankMemory(self._base_bytes, sum(entry.bytes for entry in self.list()), self._limit)

    # ---- running rows ----

    @contextmanager
    def use(self, names: Sequence[str | None]) -> Iterator[None]:
        """Hold these adapters in memory; those that are not there are read. None, the bare base, needs nothing.

        Raises:
            AdapterError: one is not registered, its folder is gone, or it is damaged or does not fit the base.
        """
        held: list[str] = []
        try:
            for name in names:
                if name is not None:
                    self._bring(name)
                    self._in_use.append(name)
                    held.append(name)
            yield
        finally:
            for name in held:
                self._in_use.remove(name)

    @contextmanager
    def rows(self, names: Sequence[str | None], solos: Sequence[int | None] | None = None) -> Iterator[BatchRows]:
        """Run `model` inside with one row a name; None is the bare base.

        Rows of one adapter should be neighbours: each run of equal names is computed together.

        Args:
            names: the adapter of each row of the batch, all of them held by `use`.
            solos: for each row, the expert of its MixLoRA that alone serves it, or None for what the router decides.

        Returns:
            The rows, whose `routing` tells after a forward what the routers of each MixLoRA decided.

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
        """Check that an adapter has this expert.

        Raises:
            AdapterError: the adapter is not registered.
            ValueError: it has no such expert.
        """
        if expert is None:
            return
        experts = 0 if name is None else self._entry(name).facts.experts
        if not 0 <= expert < experts:
            need = f"from 0 to {experts - 1}" if experts else "None: it has no experts"
            raise ValueError(f"solo_expert={expert!r}: for {name or 'the base'} it must be {need}")

    def order(self, name: str | None) -> tuple[bool, str]:
        """Key to sort rows by, so that few runs of rows are computed apart: bare base, linears only, mixtures."""
        return name is not None and self._entry(name).facts.experts > 0, name or ""

    # ---- inside ----

    def _entry(self, name: str) -> BankEntry:
        if name not in self._entries:
            raise AdapterError(f"adapter {name!r}: not registered; there are {sorted(self._entries)[:10]}")
        return self._entries[name]

    @torch.inference_mode(False)  # kept beyond the caller's inference mode, whose tensors no gradient may pass
    def _bring(self, name: str) -> None:
        entry = self._entry(name)
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return
        with naming(name):
            config, tensors, sites = read_adapter(read_source(entry.folder), BaseSource.of_model(self._plain))
        # An adapter stored in bf16 is computed in the base's dtype: quicker on a CPU than changing dtype per layer.
        dtype = next((p.dtype for p in self._plain.parameters() if p.is_floating_point()), None)
        modules = build_modules(self._plain, config, sites, tensors, dtype=dtype)
        size = 0
        parts: dict[str, LinearUpdate | MixtureOfLoraExperts] = {}
        for site in sites:
            module = modules.pop(site.path)
            if isinstance(module, MixtureOfLoraExperts):
                module.eval().prepare()
                parts[site.path] = module
                own: list[Any] = [module.router, *module.experts.parameters()]  # not the base's, which are shared
            else:
                parts[site.path] = update = LinearUpdate.of(module)
                own = [tensor for tensor in update if isinstance(tensor, torch.Tensor)]
            size += sum(tensor.numel() * tensor.element_size() for tensor in own)
        # All is computed: from here on nothing fails, so no layer is left with half an adapter.
        where: list[BankedLinear | BankedBlock] = []
        for path, part in parts.items():
            if isinstance(part, LinearUpdate):
                linear = self._linear(path)
                linear.updates[name] = part
                where.append(linear)
            else:
                block = self._block(path, part)
                block.mixtures[name] = part
                where.append(block)
        self._loaded[name] = where
        self._entries[name] = BankEntry(name, entry.folder, adapter_facts(entry.folder), size)  # as it is by now
        self._make_room()

    def _make_room(self) -> None:
        if self._limit is None:
            return
        for name in [*self._loaded]:
            if self.memory().adapters <= self._limit:
                return
            if name not in self._in_use and name != next(reversed(self._loaded)):
                self._drop(name)

    def _drop(self, name: str) -> None:
        for layer in self._loaded.pop(name, ()):
            (layer.updates if isinstance(layer, BankedLinear) else layer.mixtures).pop(name)
        entry = self._entries[name]
        self._entries[name] = BankEntry(name, entry.folder, entry.facts)

    def _linear(self, path: str) -> BankedLinear:
        """Find the banked linear at `path` of the base; it takes the plain one's place when it is first asked for."""
        if path not in self._wrapped:
            self._wrap(path, BankedLinear(self._modules[path], self._rows))
        return self._wrapped[path]  # type: ignore[return-value]

    def _block(self, path: str, mixture: MixtureOfLoraExperts) -> BankedBlock:
        if path not in self._wrapped:
            for name in (*mixture.structure.inputs, mixture.structure.output):
                self._linear(f"{path}.{name}")
            self._wrap(path, BankedBlock(self._modules[path], mixture.structure, self._rows))
        return self._wrapped[path]  # type: ignore[return-value]

    def _wrap(self, path: str, wrapper: BankedLinear | BankedBlock) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._modules[parent], name, wrapper)
        self._wrapped[path] = wrapper


def _tensor_bytes(model: nn.Module) -> int:
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
