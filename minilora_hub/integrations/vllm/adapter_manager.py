"""vLLM's LoRA managers, extended to DoRA and MixLoRA adapters.

`AdapterWorkerManager` loads an adapter and does all checks, since an error at activation would stop the engine. A LoRA
in PEFT's format is loaded by vLLM's own code and then checked. `AdapterManager` copies loaded adapters into slots and
informs the layers of the rows of each batch.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import vllm.lora.utils as lora_utils
import vllm.v1.worker.lora_model_runner_mixin as model_runner
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform

from minilora_hub.adapter_folder.folders import naming
from minilora_hub.adapter_folder.names import join_peft
from minilora_hub.bases.skeleton import BaseSource, find_base
from minilora_hub.errors import AdapterError, MiniLoraError
from minilora_hub.integrations.vllm.adapter_reading import (
    ReadAdapter,
    find_own_adapter,
    plain_torch,
    read_own_adapter,
)
from minilora_hub.integrations.vllm.lora_checks import check_lora
from minilora_hub.integrations.vllm.lora_layers import Batch, DoraLayer, SpareSlot
from minilora_hub.integrations.vllm.routed_block import KNOWN_BLOCKS, install_blocks, rows_of

logger = logging.getLogger("vllm.minilora_hub")


class OwnAdapter(LoRAModel):
    """A LoRAModel with the tensors that vLLM's class has no fields for.

    Attributes:
        magnitudes: {vLLM's name of a linear before it is fused with others: m}.
        mixtures: {path of a feed-forward block: router and experts}.
    """

    magnitudes: dict[str, Any]
    mixtures: dict[str, Any]


class AdapterManager(LRUCacheLoRAModelManager):
    """Keeps the adapters of one model, registered in memory and active in slots."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = kwargs["vllm_config"]
        self.compiled = _is_compiled(config)
        self.ranks = config.parallel_config.tensor_parallel_size
        self.batch = Batch(dora=self.compiled)
        for layer in self.modules.values():
            if isinstance(layer, DoraLayer):
                layer.batch = self.batch
        for wrapper in self.punica_wrapper_mapping.values():
            wrapper._token_lora_indices.fill_(-1)  # uninitialised in vLLM, and graphs read past the batch's rows
        self.blocks = [] if self.compiled else install_blocks(self.model, self.batch)

    def refuse_unfit(self, adapter: OwnAdapter) -> None:
        """Raise an AdapterError unless this model has a layer for every part of an adapter."""
        parts = {part: name for name, parts in self.packed_modules.items() for part in parts}
        for name in adapter.loras:
            layer = self.modules.get(parts.get(name, name))
            if layer is None and not self._is_elsewhere(name):
                raise AdapterError(f"{name}: vLLM takes no adapter there (with these settings of the server)")
            if name in adapter.magnitudes and layer is not None and not isinstance(layer, DoraLayer):
                raise AdapterError(f"{name}: DoRA on a {type(layer).__name__} cannot be served")
        if not adapter.mixtures:
            return
        if self.compiled:
            raise AdapterError("a MixLoRA beside other adapters needs a server that was started with --enforce-eager")
        if self.ranks > 1:
            raise AdapterError(
                f"tensor_parallel_size={self.ranks}: a MixLoRA beside other adapters needs 1; `vllm serve` of the "
                "adapter itself takes any"
            )
        for name in adapter.mixtures:
            if name not in self.blocks and not self._is_elsewhere(name):
                kind = type(self.model.get_submodule(name)).__name__ if name in self._paths else "missing"
                raise AdapterError(f"{name}: experts need a block of class {', '.join(KNOWN_BLOCKS)}; it is {kind}")
            if not adapter.mixtures[name].routing.weights_sum_to_one and self._has_output_bias(name):
                raise AdapterError(f"{name}.down_proj has a bias: only routing_strategy='top_k' can be served there")

    def activate_adapter(self, lora_id: int) -> bool:
        """Copy an adapter into a slot; return False if it is in one already."""
        changed: bool = super().activate_adapter(lora_id)
        if changed:
            magnitudes = getattr(self._registered_adapters[lora_id], "magnitudes", {})
            index = self.lora_index_to_id.index(lora_id)
            for name, layer in self.modules.items():
                if isinstance(layer, DoraLayer):
                    layer.set_dora(index, [magnitudes.get(part) for part in self.packed_modules.get(name, [name])])
            self._last_mapping = None  # an adapter of another kind may have this number now
        return changed

    def prepare_norms(self, adapter: OwnAdapter) -> None:
        """Compute the norms of the base's weights that the adapter needs, unless they were computed before."""
        for name, layer in self.modules.items():
            parts = self.packed_modules.get(name, [name])
            if isinstance(layer, DoraLayer) and any(part in adapter.magnitudes for part in parts):
                layer.weight_norms_squared()

    def remove_all_adapters(self) -> None:
        """Remove all adapters and the norms, since vLLM calls this when the base's weights are replaced."""
        super().remove_all_adapters()
        for layer in self.modules.values():
            if isinstance(layer, DoraLayer):
                layer.forget_norms()

    def _set_adapter_mapping(self, mapping: Any) -> None:
        super()._set_adapter_mapping(mapping)
        if self.compiled:
            return
        used = {number: self._registered_adapters.cache.get(number) for number in set(mapping.index_mapping) - {0}}
        self.batch.dora = any(getattr(adapter, "magnitudes", None) for adapter in used.values())
        self.batch.routed = [
            (rows_of(number, mapping.index_mapping, self.device), mixtures)
            for number, adapter in used.items()
            if (mixtures := getattr(adapter, "mixtures", None))
        ]

    def _create_merged_loras_inplace(self, lora_model: Any) -> None:
        if lora_model.loras:  # a MixLoRA may have experts only
            super()._create_merged_loras_inplace(lora_model)

    def _is_elsewhere(self, name: str) -> bool:
        """Whether the layer of this name is on another pipeline rank."""
        parts = name.split(".")
        paths = (".".join(parts[:count]) for count in range(1, len(parts)))
        return any(isinstance(self._paths.get(path), PPMissingLayer) for path in paths)

    def _has_output_bias(self, name: str) -> bool:
        return name in self.blocks and getattr(self._paths[name].down_proj, "bias", None) is not None

    @property
    def _paths(self) -> dict[str, Any]:
        return dict(self.model.named_modules(remove_duplicate=False))


class AdapterWorkerManager(LRUCacheWorkerLoRAManager):
    """Loads the adapters of a worker process."""

    _manager_cls = AdapterManager

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        self._base_name = vllm_config.model_config.model
        self._base_revision = vllm_config.model_config.revision

    @cached_property
    def base(self) -> BaseSource:
        """The base that vLLM serves, read without its weights."""
        return find_base(self._base_name, self._base_revision)

    def _load_adapter(self, lora_request: Any) -> Any:
        path = lora_utils.get_adapter_absolute_path(lora_request.lora_path)
        try:
            with naming(lora_request.lora_name):
                source = find_own_adapter(path)
                if source is not None:
                    return self._build(read_own_adapter(source, self.base), lora_request.lora_int_id)
                manager: Any = self._adapter_manager
                lora = super()._load_adapter(lora_request)
                check_lora(lora, manager.modules, manager.packed_modules)
                return lora
        except MiniLoraError as error:
            raise ValueError(str(error)) from error  # the type of vLLM's own errors; it can be pickled

    def _build(self, adapter: ReadAdapter, number: int) -> OwnAdapter:
        if adapter.rank > self.lora_config.max_lora_rank:
            raise AdapterError(
                f"r={adapter.rank}: the server was started with --max-lora-rank {self.lora_config.max_lora_rank}"
            )
        manager: Any = self._adapter_manager
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        mapper = None if mapper is None else mapper.get_rename_mapper()
        model = OwnAdapter.from_lora_tensors(
            lora_model_id=number,
            tensors=adapter.tensors,
            peft_helper=PEFTHelper(r=adapter.rank, lora_alpha=adapter.rank, target_modules=[]),  # s is in B
            device="cpu",
            dtype=self.lora_config.lora_dtype,
            weights_mapper=mapper,
        )
        named = {
            path: lora_utils.parse_fine_tuned_lora_name(join_peft(path, "lora_B"), mapper)[0]
            for path in adapter.magnitudes
        }
        model.magnitudes = {named[path]: m for path, m in adapter.magnitudes.items()}
        model.mixtures = adapter.mixtures
        manager.refuse_unfit(model)
        with plain_torch():
            for mixture in model.mixtures.values():
                mixture.to(device=self.device, dtype=self.lora_config.lora_dtype)
        manager.prepare_norms(model)
        return model


def install() -> None:
    """Replace vLLM's classes with these. A second call changes nothing."""
    if issubclass(model_runner.LRUCacheWorkerLoRAManager, AdapterWorkerManager):
        return
    lora_utils._all_lora_classes = tuple(_extended(kind) for kind in lora_utils._all_lora_classes)
    lora_utils.LogitsProcessorWithLoRA = _extended(lora_utils.LogitsProcessorWithLoRA)
    model_runner.LRUCacheWorkerLoRAManager = AdapterWorkerManager


def _extended(kind: Any) -> Any:
    mixins: tuple[Any, ...] = ()
    # A layer that is sharded along the LoRA rank has only a part of A and B.
    if issubclass(kind, BaseLinearLayerWithLoRA) and "Sharded" not in kind.__name__:
        mixins += (DoraLayer,)
    if current_platform.is_cpu() and not issubclass(kind, (FusedMoEWithLoRA, FusedMoE3DWithLoRA)):
        mixins += (SpareSlot,)
    return type(kind.__name__, (*mixins, kind), {}) if mixins else kind


def _is_compiled(config: Any) -> bool:
    """Whether the model is compiled or captured once, so that Python does not run for each batch."""
    compilation = config.compilation_config
    return compilation.mode != CompilationMode.NONE or compilation.cudagraph_mode != CUDAGraphMode.NONE
