"""Under which name an adapter refers to its base: never one whose files hold other weights than the base has.

A model that is handed in is compared with the files it names, and whatever is saved with them once more if the base has
changed since: an adapter may have been merged into it, its embeddings resized, some of its weights trained.
"""

import os
from contextlib import contextmanager

from .adapter_files import base_source, first_names, local_folder
from .attach import detach, replace_module
from .base_loading import differing_tensors, refuse_unknown_tokens, same_digests, tensor_digests

HOLDS_AN_ADAPTER = "holds_merged_adapter"  # attribute of a base into which an adapter was merged


class NamedBase:
    """What an adapted model does so that loading its adapter gives the base that it is on."""

    # What the base was when it was last known to be the one that is named: name, revision, digests of its tensors.
    _base_as_named = None
    _base_cache_dir = None

    @classmethod
    def _refuse_other_weights(cls, base, config):
        name = config.base_model_name_or_path
        folder = local_folder(base_source(name), config.base_model_revision)
        try:
            differing = differing_tensors(base, folder)
        except Exception as error:  # whatever a base's own loading raises
            raise ValueError(
                f"base: this {type(base).__name__} cannot be compared with the files of {name!r}, which it names "
                f"({type(error).__name__}: {error}): pass that name instead of the model"
            ) from error
        if differing:
            raise ValueError(
                f"base: this {type(base).__name__} names {name!r}, but has other weights than its files "
                f"({first_names(differing)}), so loading the adapter would give another model: save it to a folder, "
                "base.save_pretrained(folder), and pass the folder"
            )

    def _remember_base(self, digests, cache_dir):
        """Keep what the base was when it was the one that is named, or None; and where its files were found."""
        config, self._base_cache_dir = self.config, cache_dir
        if digests is not None:
            self._base_as_named = (config.base_model_name_or_path, config.base_model_revision, digests)

    def save_base(self, folder, **kwargs):
        """Write the base as it is now, without the adapter, to a folder, and name that folder as the adapter's base.

        For a base that is to be found nowhere else: an adapter was merged into it, or its embeddings were resized.

        Args:
            folder: folder, made if missing.
            **kwargs: passed to the base's `save_pretrained` (`max_shard_size`, …).

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
        self.config.base_fingerprint = self._fingerprint(self.config, None)

    @contextmanager
    def _plain_base(self):
        """The base without the adapter, for a moment."""
        modules = {site.path: self.base.get_submodule(site.path) for site in self.sites}
        detach(self.base, self.sites)
        try:
            yield self.base
        finally:
            for path, module in modules.items():
                replace_module(self.base, path, module)

    def _check_before_saving(self, state_dict, tokenizer):
        """Raise unless loading what is about to be saved gives this model."""
        name = self.config.base_model_name_or_path
        if name is not None:
            self._require_base_as_named(name, state_dict)
        elif getattr(self.base, HOLDS_AN_ADAPTER, False):
            raise ValueError(
                "base_model_name_or_path=None: an adapter was merged into the base, so nothing that has a name holds "
                "its weights: call save_base(folder) first, which writes the base there and names it"
            )
        if tokenizer is not None:
            rows = self.get_input_embeddings().weight.shape[0]
            surplus = sorted(token for token in tokenizer.get_vocab().values() if token >= rows)
            own = self._base_tokenizer() if surplus and name is not None else None
            if own is not None:  # some bases never use the last tokens of their own tokenizer
                known = set(own.get_vocab().values())
                refuse_unknown_tokens([token for token in surplus if token not in known], rows, tokenizer)

    def _require_base_as_named(self, name, state_dict):
        revision = self.config.base_model_revision
        folder = local_folder(base_source(name), revision, self._base_cache_dir)
        before = self._base_as_named if (self._base_as_named or ())[:2] == (name, revision) else None
        if before is None and folder is None:
            return  # it was handed in under the name of files that are not here
        given = {id(p): state_dict[n] for n, p in self.named_parameters() if n in (state_dict or {})}
        with self._plain_base() as base:
            digests = tensor_digests(base, given)
            if before is not None and same_digests(before[2], digests):
                return
            try:
                differing = ["its files are gone"] if folder is None else differing_tensors(base, folder, given)
            except Exception as error:  # whatever a base's own loading raises
                differing = [f"{type(error).__name__}: {error}"]
        if differing:
            raise ValueError(
                f"the base has other weights than the files of {name!r}, or cannot be compared with them "
                f"({first_names(differing)}), so loading the adapter would give another model: call save_base(folder) "
                "first, which writes the base there and names it"
            )
        self._base_as_named = (name, revision, digests)
