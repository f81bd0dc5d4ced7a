"""Save an adapter so that loading it gives the model that was saved.

An adapter never names a base whose files hold other weights, or other settings that outputs depend on, than its own
base has. A model that is passed to `from_base` is compared with the files it names, and saving compares again if the
base has changed since.
"""

import copy
import inspect
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, distributed, nn
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .adapter_files import ADAPTER_FILE, CODE_FILES, base_source, first_names, local_folder, write_adapter
from .attach import adapter_parameters, detach, replace_module
from .base_loading import (
    Digests,
    differing_settings,
    differing_tensors,
    fingerprint_of,
    refuse_unknown_tokens,
    same_digests,
    tensor_digests,
)
from .heads import auto_map, auto_names, class_name, fresh_modules, saved_parameters
from .linear_layers import is_split, speed_up_linears, whole_tensor
from .trainer_support import find_in_state_dict, without_wrappers, write_checkpoint

logger = logging.get_logger(__name__)

HOLDS_AN_ADAPTER = "holds_merged_adapter"  # attribute of a base into which an adapter was merged
PUSH_ARGUMENTS = tuple(inspect.signature(PreTrainedModel.push_to_hub).parameters)


class SavedAdapter(PreTrainedModel):
    """The part of an adapted model that names its tensors and saves them."""

    base: Any
    sites: Any
    # The base as of the last time it was known to equal the files that are named: name, revision, tensor digests.
    _base_as_named: tuple[str, str | None, Digests] | None = None
    _base_cache_dir: Any = None

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """{canonical name: parameter} of the adapter: ``layers.<i>.<path in the layer>.<lora_A, lora_B, …>``.

        Those of the modules in `modules_to_save` have their path in the base.
        """
        saved = saved_parameters(self.base, self.config.modules_to_save)
        return {**adapter_parameters(self.base, self.sites), **saved}

    def _adapter_names(self) -> dict[str, str]:
        """{name of an adapter's parameter in this model: its canonical name}."""
        canonical = {id(parameter): name for name, parameter in self.adapter_parameters().items()}
        return {name: canonical[id(p)] for name, p in self.named_parameters() if id(p) in canonical}

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as torch does; the adapter's alone, as in Trainer's checkpoints, need none of the base."""
        names = {without_wrappers(name): name for name in self._adapter_names()}
        given = {without_wrappers(name): tensor for name, tensor in state_dict.items()}
        if given.keys() != names.keys():
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        loaded = super().load_state_dict({names[n]: given[n] for n in given}, strict=False, assign=assign)
        return type(loaded)([], loaded.unexpected_keys)  # the base's are not missing

    def save_pretrained(  # type: ignore[override]
        self: Any,
        save_directory: str | os.PathLike[str],
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write config.json, the adapter's tensors, the code to load them, tokenizer and generation settings.

        Never the base's weights, and never an adapter_config.json, which would make AutoModel ignore config.json. Where
        FSDP2 or ZeRO-3 has split the adapter, every process must call this, and the first one writes.

        Args:
            save_directory: folder, made if missing.
            state_dict: weights to save instead of the current ones, under the parameter names of this model or of a
                wrapper around it (as Trainer passes).
            push_to_hub: also upload the folder (see `push_to_hub`); `repo_id`, `token` and the like go into `kwargs`.
            tokenizer: tokenizer or processor to save. Default: the base's own, if it is on this machine.
            **kwargs: the arguments of `push_to_hub`; transformers' others (`max_shard_size`, …) have no effect.

        Raises:
            ValueError: the base has other weights or settings than the files of the one that is named, the tokenizer
                has more tokens than the base, or `state_dict` lacks a tensor of the adapter. Nothing is written then.
        """
        split = state_dict is None and any(is_split(parameter) for parameter in self.adapter_parameters().values())
        rank = distributed.get_rank() if distributed.is_initialized() else 0
        writes = kwargs.get("is_main_process", True) and not (split and rank)
        if not (writes or split):
            return
        self._check_before_saving(state_dict, tokenizer)
        names = self._adapter_names()
        state = dict(self.named_parameters()) if state_dict is None else state_dict
        held = find_in_state_dict(names, state)
        tensors = {held[name]: whole_tensor(state[held[name]]).detach().cpu() for name in names}
        if not writes:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(folder / ADAPTER_FILE, {canonical: tensors[held[name]] for name, canonical in names.items()})
        write_checkpoint(folder, tensors)
        config = copy.deepcopy(self.config)
        prefix = type(config).__name__.removesuffix("Config")
        own = type(self).auto_class.__name__
        names = auto_names(self.base, own, config.modules_to_save or ())
        config.architectures = [class_name(prefix, own if own in names else names[-1])]
        config.auto_map = auto_map(prefix, names)
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

    def _base_tokenizer(self) -> Any:
        name = self.config.base_model_name_or_path
        if name is None:
            logger.warning("No tokenizer was saved: this model does not know which base it is on. Pass tokenizer=.")
            return None
        source = base_source(name)
        only_text = self.base.main_input_name == "input_ids" and not hasattr(self.base.config, "vision_config")
        try:  # saving must not need the network
            return (AutoTokenizer if only_text else AutoProcessor).from_pretrained(
                source, revision=self.config.base_model_revision, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, TypeError) as error:  # TypeError: wav2vec2 without a vocabulary
            logger.warning(f"No tokenizer was saved: none found with the base {name!r} ({error}). Pass tokenizer=.")
            return None

    def push_to_hub(self, repo_id: str, *, private: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        """Upload the files of `save_pretrained` to a Hub repo, private by default. minilora_hub.push also checks."""
        return super().push_to_hub(repo_id, private=private, **kwargs)  # type: ignore[arg-type]

    @staticmethod
    def _refuse_other_weights(base: Any, config: Any, auto_class: Any) -> None:
        """Compare a base with the files that it names; a head that is not in them is to be saved with the adapter."""
        name = config.base_model_name_or_path
        folder = local_folder(base_source(name), config.base_model_revision)
        try:
            differing = differing_tensors(base, folder, None, saved_parameters(base, config.modules_to_save))
        except Exception as error:  # a base's own loading may raise anything
            raise ValueError(
                f"base: this {type(base).__name__} cannot be compared with the files of {name!r}, which it names "
                f"({type(error).__name__}: {error}): pass that name instead of the model"
            ) from error
        names = [clause.partition(" ")[0] for clause in differing]
        modules, others = fresh_modules(base, names, auto_class.__name__)
        config.modules_to_save = [*(config.modules_to_save or ()), *modules] or config.modules_to_save
        differing = [clause for clause, name in zip(differing, names, strict=True) if name in others]
        if differing:
            raise ValueError(
                f"base: this {type(base).__name__} names {name!r}, but has other weights than its files "
                f"({first_names(differing)}), so loading the adapter would give another model: save it to a folder, "
                "base.save_pretrained(folder), and pass the folder"
            )

    @staticmethod
    def _refuse_other_settings(base: Any, config: Any, cache_dir: Any) -> None:
        """Compare a base's configuration with the one in the files that it names."""
        name = config.base_model_name_or_path
        folder = name and local_folder(base_source(name), config.base_model_revision, cache_dir)
        if folder and (differing := differing_settings(base.config, folder)):
            raise ValueError(
                f"base: its configuration is not the one of {name!r} ({first_names(differing)}), which an adapter does "
                "not hold, so loading the adapter would give another model: save the base with its configuration to a "
                "folder, base.save_pretrained(folder), and pass the folder"
            )

    def _remember_base(self, digests: Digests | None, cache_dir: Any) -> None:
        """Remember that the base has these digests and is the one that is named, and the cache of its files."""
        self._base_cache_dir = cache_dir
        if digests is not None:
            self._base_as_named = (self.config.base_model_name_or_path, self.config.base_model_revision, digests)

    def save_base(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the base as it is now, without the adapter, to a folder, and name that folder as the adapter's base.

        For a base that no files hold: an adapter was merged into it, or its embeddings were resized. `kwargs` are those
        of the base's `save_pretrained`.

        Raises:
            ValueError: the folder is the one that holds the base as it was, whose files may still be in use.
        """
        name = self.config.base_model_name_or_path
        here = name and local_folder(base_source(name), self.config.base_model_revision, self._base_cache_dir)
        if here and os.path.exists(folder) and os.path.samefile(folder, here):
            raise ValueError(f"folder={str(folder)!r}: holds the base as it was loaded; another folder is required")
        tokenizer = self._base_tokenizer() if name else None
        with self._plain_base() as base:
            base.save_pretrained(folder, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        self.config.base_model_name_or_path, self.config.base_model_revision = str(folder), None
        self.config.base_fingerprint = fingerprint_of(self.config, None)

    @contextmanager
    def _plain_base(self) -> Iterator[Any]:
        """The base without the adapter, inside a `with` block."""
        modules = {site.path: self.base.get_submodule(site.path) for site in self.sites}
        detach(self.base, self.sites)
        try:
            yield self.base
        finally:
            for path, module in modules.items():
                replace_module(self.base, path, module)
            speed_up_linears(self.base)

    def _check_before_saving(self: Any, state_dict: Mapping[str, Tensor] | None, tokenizer: Any) -> None:
        """Raise a ValueError unless loading what will be saved gives this model."""
        name = self.config.base_model_name_or_path
        if name is not None:
            self._require_base_as_named(name, state_dict)
        elif getattr(self.base, HOLDS_AN_ADAPTER, False):
            raise ValueError(
                "base_model_name_or_path=None: an adapter was merged into the base, so nothing that has a name holds "
                "its weights: call save_base(folder) first, which writes the base there and names it"
            )
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
        if hasattr(tokenizer, "get_vocab"):
            rows = self.base.config.get_text_config(decoder=True).vocab_size  # CLIP has no `get_input_embeddings`
            surplus = sorted(token for token in tokenizer.get_vocab().values() if token >= rows)
            own = self._base_tokenizer() if surplus and name is not None else None
            if own is not None:  # some bases do not embed the last tokens of their own tokenizer
                known = set(own.get_vocab().values())
                refuse_unknown_tokens([token for token in surplus if token not in known], rows, tokenizer)

    def _require_base_as_named(self: Any, name: str, state_dict: Mapping[str, Tensor] | None) -> None:
        revision = self.config.base_model_revision
        folder = local_folder(base_source(name), revision, self._base_cache_dir)
        before = self._base_as_named if (self._base_as_named or ())[:2] == (name, revision) else None
        if before is None and folder is None:
            return  # it was passed as a model, under the name of files that are not on this machine
        state = state_dict or {}
        given = {id(p): state[n] for n, p in self.named_parameters() if n in state}
        with self._plain_base() as base:
            saved = saved_parameters(base, self.config.modules_to_save)
            digests = tensor_digests(base, given, saved)
            split = any(map(is_split, base.parameters()))  # one is compared once, if all processes have its tensors
            same = (split and state_dict is not None) or (before is not None and same_digests(before[2], digests))
            differing = [] if folder or same else ["its files are gone"]
            try:
                if folder and not same:
                    differing += differing_tensors(base, folder, given, saved)
                if folder:
                    differing += differing_settings(base.config, folder)
            except Exception as error:  # a base's own loading may raise anything
                differing.append(f"{type(error).__name__}: {error}")
        if differing:
            raise ValueError(
                f"the base has other weights or settings than the files of {name!r}, or cannot be compared with them "
                f"({first_names(differing)}), so loading the adapter would give another model: call save_base(folder) "
                "first, which writes the base there and names it"
            )
        if not same:
            self._base_as_named = (name, revision, digests)
