"""What MixLoRA and DoRA models share: a base model of transformers with an adapter in it, loaded and saved as one.

The base is loaded by transformers with whatever the caller passes; the adapter is attached to it in place; only the
adapter's tensors are ever saved.
"""

import copy
import inspect
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from .adapter_files import (
    ADAPTER_FILE,
    BASE_ALIASES,
    CODE_FILES,
    UNKNOWN,
    base_fingerprint,
    cached_commit,
    read_adapter,
    write_adapter,
)
from .attach import adapter_parameters, attach, detach, expected_tensors
from .base_structure import LinearSite, plan_sites

logger = logging.get_logger(__name__)

# Arguments of from_pretrained that say where the adapter is, and those that reach adapter and base alike.
ADAPTER_ONLY_ARGUMENTS = ("revision", "code_revision", "subfolder", "trust_remote_code", "adapter_kwargs", "_from_auto")
SHARED_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "proxies")
PUSH_ARGUMENTS = tuple(inspect.signature(PreTrainedModel.push_to_hub).parameters)


class AdaptedModel(PreTrainedModel):
    """What the four public classes share: building, loading, saving, merging and taking off an adapter.

    Attributes:
        base: the base model with the adapter in it, in place.
        sites: where the adapter sits (`LinearSite` and `MixtureSite`).
    """

    base_model_prefix = "base"
    main_input_name = "input_ids"
    _tied_weights_keys = {}
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    auto_class: Any = None  # AutoModel or AutoModelForCausalLM: what loads the base

    def __init__(self, config, base=None, adapter_file=None, seed=0, adapter_dtype=None):
        if base is None:
            if config.text_config is None:
                raise ValueError(f"{type(self).__name__}: a base, or a configuration with text_config, is required")
            base = self.auto_class.from_config(config.text_config)
        # Everything that can be wrong is found before the base is changed.
        sites = plan_sites(base, config)
        tensors = None if adapter_file is None else read_adapter(adapter_file, expected_tensors(config, sites))
        config.text_config = base.config
        config.dtype = base.dtype
        config._attn_implementation = base.config._attn_implementation
        super().__init__(config)
        self._trainable_before = [p for p in base.parameters() if p.requires_grad]
        attach(base, config, sites, tensors, seed, adapter_dtype)
        for parameter in self._trainable_before:
            parameter.requires_grad_(False)
        self.base = base
        self.sites = sites
        self.supports_gradient_checkpointing = base.supports_gradient_checkpointing
        for name in ("hf_device_map", "hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            if hasattr(base, name):
                setattr(self, name, getattr(base, name))
        self.post_init()
        self.train(base.training)

    def init_weights(self):
        """Nothing: the base comes initialised, and the adapter is initialised where it is attached."""

    def adapter_parameters(self):
        """{canonical name: parameter} of the adapter: ``layers.<i>.<path in the layer>.<lora_A, lora_B, …>``."""
        return adapter_parameters(self.base, self.sites)

    def num_adapter_parameters(self):
        """Number of trainable values the adapter adds to the base."""
        return sum(parameter.numel() for parameter in self.adapter_parameters().values())

    # ---- from a base ----

    @classmethod
    def from_base(cls, base, config, *, seed=0, adapter_dtype=None, base_trust_remote_code=False, **base_arguments):
        """A fresh adapter on a base; the output equals the base's until the adapter is trained.

        (Not so under the routing strategies ``"top_p"`` and ``"switch"``, whose weights do not sum to one.)

        Takes ownership of a model that is handed in: its modules are replaced in place. `unload` gives it back.

        Args:
            base: a model, a Hub id, a folder, or a registered alias such as ``"embedded"``.
            config: the adapter's configuration. It is copied.
            seed: seed of the initial weights; torch's global random state is left alone.
            adapter_dtype: dtype of the adapter's tensors. Default: float32. A DoRA magnitude is always float32.
            base_trust_remote_code: whether the base's own code may run.
            **base_arguments: passed to the base's from_pretrained (`dtype`, `device_map`, `revision`, …).

        Raises:
            ValueError: the base is adapted already, is not understood, or has none of the targets.
        """
        config = copy.deepcopy(config)
        cache_dir = base_arguments.get("cache_dir")
        if isinstance(base, (str, os.PathLike)):
            config.base_model_name_or_path = str(base)
            config.base_model_revision = base_arguments.pop("revision", None)
            base = cls._load_base(config, base_trust_remote_code, base_arguments)
            # Pinned to what was loaded, so that the adapter meets the same base a year from now.
            pinned = cached_commit(config.base_model_name_or_path, config.base_model_revision, cache_dir)
            config.base_model_revision = pinned or config.base_model_revision
        elif base_arguments:
            raise ValueError(
                f"{sorted(base_arguments)}: only for a base that is loaded by name, not one that is handed in"
            )
        elif config.base_model_name_or_path is None:
            config.base_model_name_or_path = base.config.name_or_path or None
        config.base_fingerprint = cls._fingerprint(config, cache_dir)
        return cls(config, base=base, seed=seed, adapter_dtype=adapter_dtype)

    @classmethod
    def _load_base(cls, config, trust_remote_code, arguments):
        name, revision = config.base_model_name_or_path, config.base_model_revision
        if name is None:
            raise ValueError("base_model_name_or_path=None: the configuration names no base; pass base_model=")
        source = BASE_ALIASES[name]() if name in BASE_ALIASES else name
        # AutoModel looks for a PEFT adapter first, and would ask the network without these.
        offline = {key: arguments[key] for key in ("local_files_only", "cache_dir") if key in arguments}
        if offline:
            arguments = {"adapter_kwargs": offline, **arguments}
        try:
            return cls.auto_class.from_pretrained(
                source, revision=revision, trust_remote_code=trust_remote_code, **arguments
            )
        except (OSError, ValueError) as error:
            hint = "pass base_model=<a folder or another Hub id>"
            if "trust_remote_code" in str(error):
                hint = "the base runs code of its own: pass base_trust_remote_code=True if you trust it"
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"the base model {name!r} could not be loaded: {error}\nWhat to do: {hint}") from error

    @staticmethod
    def _fingerprint(config, cache_dir):
        name = config.base_model_name_or_path
        if name is None:
            return UNKNOWN
        source = BASE_ALIASES[name]() if name in BASE_ALIASES else name
        return base_fingerprint(source, config.base_model_revision, cache_dir)

    # ---- loading ----

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        config=None,
        base_model=None,
        base_revision=None,
        base_trust_remote_code=False,
        output_loading_info=False,
        **kwargs,
    ):
        """Load an adapter and its base.

        Args:
            pretrained_model_name_or_path: Hub id or folder of the adapter.
            *model_args: refused; everything else is passed by name.
            config: its configuration; read from there by default.
            base_model: another base than the configuration names: a model, a Hub id, a folder or an alias.
            base_revision: revision of the base. The adapter's `revision` never applies to the base.
            base_trust_remote_code: whether the base's own code may run. Trusting the adapter's does not trust it.
            output_loading_info: also return transformers' dict of missing and unexpected keys: always empty, since
                a file that does not fit is an error.
            **kwargs: `revision`, `subfolder`, `token`, `cache_dir`, … find the adapter; everything else goes to the
                base (`dtype`, `device_map`, `quantization_config`, `attn_implementation`, …). A given `dtype` also
                applies to the adapter, whose tensors otherwise keep the dtype they were saved in.

        Raises:
            ValueError: the file is damaged or does not fit the configuration and the base; the message names the
                tensor.
        """
        if model_args:
            raise ValueError(
                f"{cls.__name__}.from_pretrained takes keyword arguments only, got {len(model_args)} positional"
            )
        kwargs.pop("state_dict", None)
        shared = {name: kwargs.pop(name) for name in SHARED_HUB_ARGUMENTS if kwargs.get(name) is not None}
        where = {name: kwargs.pop(name) for name in ADAPTER_ONLY_ARGUMENTS if name in kwargs}
        where = {name: where[name] for name in ("revision", "subfolder") if where.get(name)} | shared
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **where)
        config = copy.deepcopy(config)
        file = cached_file(pretrained_model_name_or_path, ADAPTER_FILE, **where)
        base, dtype = cls._base_for_adapter(config, base_model, base_revision, base_trust_remote_code, kwargs, shared)
        model = cls(config, base=base, adapter_file=file, adapter_dtype=dtype)
        model.name_or_path = str(pretrained_model_name_or_path)
        model._load_generation_config(pretrained_model_name_or_path, where)
        model.eval()
        info = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (model, info) if output_loading_info else model

    def _load_generation_config(self, name_or_path, where):
        """The adapter's own generation settings, where its folder has them; otherwise the base's stay."""
        if self.can_generate():
            try:
                self.generation_config = GenerationConfig.from_pretrained(name_or_path, **where)
            except OSError:
                logger.info("No generation_config.json with the adapter: the base's generation settings are used.")

    @classmethod
    def _base_for_adapter(cls, config, base_model, base_revision, trust_remote_code, kwargs, shared):
        """(base, dtype asked for or None); `config` is changed to name the base that was used."""
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        asked = dtype if isinstance(dtype, torch.dtype) else None
        if isinstance(base_model, torch.nn.Module):
            return base_model, asked
        if base_model is not None:
            config.base_model_name_or_path, config.base_model_revision = str(base_model), None
        if base_revision is not None:
            config.base_model_revision = base_revision
        # AutoConfig has absorbed attn_implementation by now: without this the base would silently keep its default.
        if config._attn_implementation is not None:
            kwargs.setdefault("attn_implementation", config._attn_implementation)
        base = cls._load_base(config, trust_remote_code, {"dtype": asked or config.dtype or "auto", **shared, **kwargs})
        trained_on, found = config.base_fingerprint, cls._fingerprint(config, shared.get("cache_dir"))
        if UNKNOWN not in (trained_on, found) and trained_on != found:
            warnings.warn(
                f"this adapter was trained on a base with fingerprint {trained_on}, but "
                f"{config.base_model_name_or_path!r} has {found}: its outputs may differ from those its author saw",
                stacklevel=4,
            )
        return base, asked

    # ---- saving ----

    def save_pretrained(self, save_directory, state_dict=None, push_to_hub=False, tokenizer=None, **kwargs):
        """Write config.json, the adapter's tensors, the code to load them, tokenizer and generation settings.

        Never the base's weights, and never an adapter_config.json, which would make AutoModel ignore config.json.

        Args:
            save_directory: folder, made if missing.
            state_dict: weights to save instead of the current ones, under this model's parameter names (as Trainer
                passes).
            push_to_hub: also upload the folder (see `push_to_hub`); `repo_id`, `token` and the like go into `kwargs`.
            tokenizer: the tokenizer to save. Default: the base's own, where it lies on this machine.
            **kwargs: the arguments of `push_to_hub`; others that transformers knows (`safe_serialization`,
                `max_shard_size`, …) have nothing to act on here.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        parameters = self.adapter_parameters()
        if state_dict is not None:
            names = {id(parameter): name for name, parameter in self.named_parameters()}
            parameters = {name: state_dict[names[id(parameter)]] for name, parameter in parameters.items()}
        write_adapter(folder / ADAPTER_FILE, {name: tensor.cpu() for name, tensor in parameters.items()})
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        config.auto_map = auto_map(config)
        config.to_json_file(folder / "config.json")
        for name in CODE_FILES:
            source = Path(__file__).with_name(name)
            if source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
        if self.can_generate():
            self.generation_config.save_pretrained(folder)
        tokenizer = tokenizer or self._base_tokenizer()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if push_to_hub:
            self.push_to_hub(
                kwargs.pop("repo_id", folder.name), **{k: v for k, v in kwargs.items() if k in PUSH_ARGUMENTS}
            )

    def _base_tokenizer(self):
        name = self.config.base_model_name_or_path
        if name is None:
            logger.warning("No tokenizer was saved: this model does not know which base it is on. Pass tokenizer=.")
            return None
        source = BASE_ALIASES[name]() if name in BASE_ALIASES else name
        try:  # saving must not need the network
            return AutoTokenizer.from_pretrained(
                source, revision=self.config.base_model_revision, local_files_only=True
            )
        except (OSError, ValueError) as error:
            logger.warning(f"No tokenizer was saved: none found with the base {name!r} ({error}). Pass tokenizer=.")
            return None

    def push_to_hub(self, repo_id, *, private=True, **kwargs):
        """Write the files of `save_pretrained` to a Hub repo, private by default. It checks nothing:
        minilora_hub.push does.
        """
        return super().push_to_hub(repo_id, private=private, **kwargs)

    # ---- taking the adapter off ----

    def unload(self):
        """The base as it was before, without the adapter. This model is of no use afterwards."""
        base = self.base
        detach(base, self.sites)
        for parameter in self._trainable_before:
            parameter.requires_grad_(True)
        self.base, self.sites = None, []
        return base

    def merge(self):
        """Fold the adapter into the base's weights and give the base back: a plain model. DoRA only.

        Raises:
            ValueError: this is a mixture, or a base weight is quantised or offloaded. Nothing is changed then.
        """
        if not all(isinstance(site, LinearSite) for site in self.sites):
            top_k = self.config.routing_strategy == "top_k"
            raise ValueError(
                "a MixLoRA cannot be merged: every token takes its own experts."
                + " It can be exported as a Mixtral checkpoint: minilora export --to mixtral" * top_k
            )
        layers = [self.base.get_submodule(site.path) for site in self.sites]
        merged = [layer.merged_weight() for layer in layers]
        with torch.no_grad():
            for layer, weight in zip(layers, merged, strict=True):
                layer.base_layer.weight.copy_(weight)
        return self.unload()

    # ---- what the base knows better ----

    @property
    def base_model(self):
        """The decoder without its head, as in transformers' own models."""
        return self.base.base_model

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.base.set_output_embeddings(value)

    @property
    def accepts_loss_kwargs(self):
        """Whether the base's forward takes `num_items_in_batch`; Trainer asks."""
        parameters = inspect.signature(self.base.forward).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        """The base's forward, with the adapter in it."""
        return self.base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def auto_map(config):
    """The classes that transformers' Auto classes take from a repo with this code."""
    prefix = re.sub(r"Config$", "", type(config).__name__)
    return {
        "AutoConfig": f"configuration_minilora.{prefix}Config",
        "AutoModel": f"modeling_minilora.{prefix}Model",
        "AutoModelForCausalLM": f"modeling_minilora.{prefix}ForCausalLM",
    }
