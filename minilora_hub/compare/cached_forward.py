"""One forward of a causal model with a key/value cache, under the names that the installed transformers uses."""

from __future__ import annotations

import inspect
from typing import Any

import torch


class CachedForward:
    """Forward passes of one model that continue a cache.

    transformers 5.24 renamed the argument and the output ``past_key_values`` to ``cache`` and warns about the old name.

    Args:
        model: the causal language model.

    Attributes:
        cache: the key/value cache after the last forward; None before the first.
        takes_positions: whether the model takes `position_ids`.
        device: the device of the model.
    """

    def __init__(self, model: Any) -> None:
        """Read the model's signature; nothing is computed yet."""
        self._model = model
        known = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"
        # The head is a fifth of a small model's work: only where it is needed.
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.takes_positions = "position_ids" in known
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.cache: Any = None

    def __call__(self, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """Read new tokens.

        Args:
            ids: (rows, seq) token ids that follow what is in the cache.
            **arguments: further arguments of the model's forward, e.g. `attention_mask`.

        Returns:
            Logits after the last token of each row, (rows, vocabulary).
        """
        output = self._model(
            input_ids=ids.to(self.device),
            use_cache=True,
            return_dict=True,
            **{self._cache_name: self.cache},
            **self._options,
            **arguments,
        )
        self.cache = getattr(output, self._cache_name)
        return output.logits[:, -1]

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keep these rows of the cache, in this order."""
        self.cache.batch_select_indices(rows.to(self.device))
