"""What MixLoRA and DoRA models share: a base model of transformers with an adapter in it. Saving is in `saving.py`."""

import copy
import os
from contextlib import suppress
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import cached_file, logging

from .adapter_files import ADAPTER_FILE, UNKNOWN, cached_commit, read_adapter
from .attach import attach, detach, expected_tensors, merge_into_base
from .base_delegation import DelegatesToBase
from .base_loading import fingerprint_of, load_base, load_base_for_adapter, settle_quantization, tensor_digests
from .base_structure import is_routed, plan_sites, refuse_adapted
from .heads import CLASSIFYING, fresh_modules, saved_parameters
from .linear_layers import parted_as
from .probe import settle_targets
from .saving import HOLDS_AN_ADAPTER, SavedAdapter

logger = logging.get_logger(__name__)

# Arguments of from_pretrained that say where the adapter is, and those that apply to adapter and base alike.
ADAPTER_ONLY_ARGUMENTS = ("revision", "code_revision", "subfolder", "trust_remote_code", "adapter_kwargs", "_from_auto")
SHARED_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "proxies")
KNOWN_OF_THE_BASE = (
    "hf_device_map", "hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "loss_type",
    "main_input_name", "input_modalities",
)  # fmt: skip


class AdaptedModel(DelegatesToBase, SavedAdapter):  # type: ignore[misc]  # forward, with the base's arguments
    """What the public classes share: building, loading, saving, merging and removing an adapter.

    Attributes:
        base: the base model with the adapter in it, in place.
        sites: where the adapter sits (`LinearSite`, `RoutedSite`, `ExpertsSite` and `MixtureSite`).
    """

    base_model_prefix = "base"
    main_input_name = "input_ids"
    _tied_weights_keys = {}
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    config_class: Any = None
    auto_class: Any = None  # one of `heads.HEADS`: what loads the base

    def __init__(
        self,
        config: Any,
        base: Any = None,
        adapter_file: str | None = None,
        seed: int = 0,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self._require_own_config(config)
        if base is None:
            if config.text_config is None:
                raise ValueError(f"{type(self).__name__}: a base, or a configuration with text_config, is required")
            base = self.auto_class.from_config(config.text_config, trust_remote_code=False)
        for group in [module for module in base.modules() if hasattr(module, "reshard")]:
            group.reshard()  # or the parameters below would be the whole ones, which FSDP2 forgets
        # Everything that can be wrong is found before the base is changed.
        sites = plan_sites(base, config)
        saved = saved_parameters(base, config.modules_to_save, [site.path for site in sites])
        shapes = expected_tensors(config, sites) | {name: tuple(p.shape) for name, p in saved.items()}
        tensors = None if adapter_file is None else read_adapter(adapter_file, shapes)
        settle_quantization(base, config)
        needs_2 = saved or any(not site.name.startswith("layers.") for site in sites)
        needed = 4 if config.base_quantization else 3 if config.target_parameters else 2 if needs_2 else 1
        config.format_version = max(config.format_version, needed)
        config.dtype = base.dtype
        config._attn_implementation = base.config._attn_implementation  # first: it is also set on the old text_config
        config.text_config = base.config
        if self.auto_class.__name__ == "AutoModelForSpeechSeq2Seq":
            config.__dict__["model_type"] = base.config.model_type  # by which a pipeline knows Whisper; it is not saved
        # Trainers load this name again: TRL's DPOTrainer as the model to compare with.
        config.name_or_path = config.name_or_path or (config.base_model_name_or_path and base.config.name_or_path) or ""
        super().__init__(config)
        self._trainable_before = [p for p in base.parameters() if p.requires_grad]
        attach(base, config, sites, tensors, seed, adapter_dtype)
        for name, parameter in saved.items():
            parameter.requires_grad_(True)
            if tensors is not None:
                parameter.data.copy_(parted_as(parameter, tensors[name]))
        self.base = base
        self.sites = sites
        self.supports_gradient_checkpointing = base.supports_gradient_checkpointing
        for name in KNOWN_OF_THE_BASE:
            if hasattr(base, name):
                setattr(self, name, getattr(base, name))
        self.post_init()
        self.train(base.training)

    @classmethod
    def _require_own_config(cls, config: Any) -> None:
        # By its model type: the same class may be imported from elsewhere.
        if getattr(type(config), "model_type", None) != cls.config_class.model_type:
            need = cls.config_class.__name__
            raise ValueError(f"config={type(config).__name__}(…): {cls.__name__} requires a {need}")

    def init_weights(self) -> None:
        """Do nothing: base and adapter have their weights."""

    def num_adapter_parameters(self) -> int:
        """Return the number of values the adapter adds to the base, those of `modules_to_save` included."""
        return sum(parameter.numel() for parameter in self.adapter_parameters().values())

    # ---- from a base ----

    @classmethod
    def from_base(
        cls,
        base: Any,
        config: Any,
        *,
        seed: int = 0,
        adapter_dtype: torch.dtype | None = None,
        base_trust_remote_code: bool = False,
        **base_arguments: Any,
    ) -> Any:
        """Put a fresh adapter on a base; the output equals the base's until the adapter is trained.

        (Not so under the routing strategies ``"top_p"`` and ``"switch"``, whose weights do not sum to one.)

        Args:
            base: a Hub id, a folder, a registered alias such as ``"embedded"``, or a model. The latter is changed in
                place, which `unload` undoes; if it names files on this machine, it is compared with them.
            config: the adapter's configuration. It is copied.
            seed: seed of the initial weights; torch's global random state is left alone.
            adapter_dtype: dtype of the adapter's tensors. Default: float32. A DoRA magnitude is always float32.
            base_trust_remote_code: whether the base's own code may run.
            **base_arguments: passed to the base's from_pretrained (`dtype`, `device_map`, `revision`, …).

        Raises:
            ValueError: the base is adapted already, is not understood, has none of the targets, or has other weights
                or settings than the files it names; or its checkpoint lacks a tensor.
        """
        cls._require_own_config(config)
        config = copy.deepcopy(config)
        config.text_config, config.name_or_path = None, ""  # a model's configuration has those of another base
        cache_dir = base_arguments.get("cache_dir")
        loaded = isinstance(base, (str, os.PathLike))
        if loaded:
            config.base_model_name_or_path = str(base)
            config.base_model_revision = base_arguments.pop("revision", None)
            base = load_base(cls.auto_class, config, base_trust_remote_code, base_arguments, seed)
            # Pinned to what was loaded, so that the adapter is loaded with the same base a year from now.
            pinned = cached_commit(config.base_model_name_or_path, config.base_model_revision, cache_dir)
            config.base_model_revision = pinned or config.base_model_revision
        elif base_arguments:
            raise ValueError(
                f"{sorted(base_arguments)}: only for a base that is loaded by name, not for a model that is passed"
            )
        elif config.base_model_name_or_path is None:
            config.base_model_name_or_path = base.config.name_or_path or None
        config.base_fingerprint = fingerprint_of(config, cache_dir)
        files_are_here = config.base_fingerprint != UNKNOWN
        if not loaded and files_are_here:
            refuse_adapted(base)
            cls._refuse_other_weights(base, config, cls.auto_class)
        elif not loaded and base.config.name_or_path:
            logger.warning(
                f"The files of {config.base_model_name_or_path!r} are not on this machine, so it was not checked that "
                "the base has their weights."
            )
        if files_are_here:
            cls._refuse_other_settings(base, config, cache_dir)
        if not loaded and config.modules_to_save is None and cls.auto_class.__name__ in CLASSIFYING:
            # Whether the head is in files is not known, so it is saved.
            names = [] if files_are_here else [name for name, _ in base.named_parameters()]
            config.modules_to_save = fresh_modules(base, names, cls.auto_class.__name__)[0] or None
        saved = saved_parameters(base, config.modules_to_save)
        digests = tensor_digests(base, saved=saved) if loaded or files_are_here else None
        settle_targets(base, config, cls._refused_linears(base))
        model = cls(config, base=base, seed=seed, adapter_dtype=adapter_dtype)
        model._remember_base(digests, cache_dir)
        return model

    @classmethod
    def _refused_linears(cls, base: Any) -> dict[str, str]:
        """Return {path: reason} of linears that a subclass cannot adapt."""
        return {}

    # ---- loading ----

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        base_model: Any = None,
        base_revision: str | None = None,
        base_trust_remote_code: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load an adapter and its base.

        Args:
            pretrained_model_name_or_path: Hub id or folder of the adapter.
            *model_args: refused; everything else is passed by name.
            config: its configuration; read from there by default.
            base_model: another base than the configuration names: a model, a Hub id, a folder or an alias.
            base_revision: revision of the base, to which the adapter's `revision` never applies.
            base_trust_remote_code: whether the base's own code may run. Trusting the adapter's does not trust it.
            output_loading_info: also return transformers' dict of missing and unexpected keys, which are none.
            **kwargs: `revision`, `subfolder`, `token`, `cache_dir`, … find the adapter; everything else goes to the
                base (`dtype`, `device_map`, `quantization_config`, `attn_implementation`, …). A given `dtype` also
                applies to the adapter, whose tensors otherwise keep the dtype they were saved in.

        Raises:
            ValueError: the file is damaged or does not fit configuration and base; the message names the tensor.
        """
        if model_args:
            raise ValueError(
                f"{cls.__name__}.from_pretrained takes keyword arguments only, got {len(model_args)} positional"
            )
        if kwargs.pop("state_dict", None) is not None:
            raise ValueError("state_dict: an adapter has the weights of its file; call load_state_dict afterwards")
        shared = {name: kwargs.pop(name) for name in SHARED_HUB_ARGUMENTS if kwargs.get(name) is not None}
        where = {name: kwargs.pop(name) for name in ADAPTER_ONLY_ARGUMENTS if name in kwargs}
        where = {name: where[name] for name in ("revision", "subfolder") if where.get(name)} | shared
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **where)
        config = copy.deepcopy(config)
        config._check()  # transformers has set what was passed on top of the file's fields, unchecked
        file = cached_file(pretrained_model_name_or_path, ADAPTER_FILE, **where)
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype, dtype)
        if dtype not in (None, "auto") and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f'dtype={dtype!r}: must be "auto", a floating-point dtype of torch, or the name of one')
        dtype = dtype if isinstance(dtype, torch.dtype) else None
        base = base_model
        if not isinstance(base, torch.nn.Module):
            if base_model is not None:
                config.base_model_name_or_path, config.base_model_revision = str(base_model), None
            if base_revision is not None:
                config.base_model_revision = base_revision
            base = load_base_for_adapter(cls.auto_class, config, base_trust_remote_code, dtype, shared, kwargs)
        # Of a quantised base only, which saving would otherwise have to load a second time.
        quantised = base is not base_model and getattr(base, "hf_quantizer", None) is not None
        saved = saved_parameters(base, config.modules_to_save)
        digests = tensor_digests(base, saved=saved) if quantised else None
        try:
            model = cls(config, base=base, adapter_file=file, adapter_dtype=dtype)
        except ValueError as error:
            named = (base.config.name_or_path if base is base_model else config.base_model_name_or_path) or "a model"
            raise ValueError(f"adapter {str(pretrained_model_name_or_path)!r} on base {named!r}: {error}") from error
        model._remember_base(digests, shared.get("cache_dir"))
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        if model.can_generate():
            with suppress(OSError):  # where there are none, the base's stay
                model.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **where)
        model.eval()
        info = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        return (model, {name: [] for name in info}) if output_loading_info else model

    # ---- removing the adapter ----

    def unload(self) -> Any:
        """Remove the adapter and return the base as it was. This model cannot be used afterwards."""
        base = self.base
        detach(base, self.sites)
        for parameter in self._trainable_before:
            parameter.requires_grad_(True)
        self.base, self.sites = None, []
        return base

    def merge(self) -> Any:
        """Merge the adapter into the base's weights and return the base: a plain model, without a name. DoRA only.

        Raises:
            ValueError: this is a mixture, or a base weight is quantised, offloaded or shared with another module.
                Nothing is changed then.
        """
        if any(is_routed(site) for site in self.sites):
            top_k = self.config.routing_strategy == "top_k" and self.config.format_version < 4
            raise ValueError(
                "a MixLoRA cannot be merged: every token takes its own experts."
                + " It can be exported as a Mixtral checkpoint: minilora export --to mixtral" * top_k
            )
        merge_into_base(self.base, self.sites)
        base = self.unload()
        # No files hold its weights any more.
        base.name_or_path = base.config.name_or_path = ""
        setattr(base, HOLDS_AN_ADAPTER, True)
        return base
