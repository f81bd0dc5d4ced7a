"""What an adapted model passes on to the base that it wraps: embeddings, decoder, and forward."""

import inspect
from typing import Any

from torch import Tensor

from .layer_stacks import find_decoder_layers
from .trainer_support import by_name, takes_base_arguments


def done_by_base(name: str) -> Any:
    """Return a method that calls the base's method of this name."""
    return lambda model, *args, **kwargs: getattr(model.base, name)(*args, **kwargs)


class DelegatesToBase:
    """The part of an adapted model that its base, `self.base`, does for it."""

    base: Any

    @property
    def base_model(self: Any) -> Any:
        """The decoder without its head, as in transformers' own models."""
        decoder = self.base.base_model
        if decoder is self.base and self.can_generate():  # Llama 4's text model names no part
            decoder = self.base.get_submodule(find_decoder_layers(self.base)[0].rpartition(".")[0])
        return decoder

    get_input_embeddings = done_by_base("get_input_embeddings")
    set_input_embeddings = done_by_base("set_input_embeddings")
    get_output_embeddings = done_by_base("get_output_embeddings")
    set_output_embeddings = done_by_base("set_output_embeddings")
    resize_token_embeddings = done_by_base("resize_token_embeddings")  # the base's attributes hold the size, too

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base's forward takes `num_items_in_batch`; Trainer asks."""
        parameters = inspect.signature(self.base.forward).parameters.values()
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        return getattr(self.base, "accepts_loss_kwargs", takes_any)

    @takes_base_arguments
    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The base's forward, with the adapter in it: same arguments, same outputs."""
        return self.base(**self._base_arguments(input_ids, args, kwargs))

    def _base_arguments(self, input_ids: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a call's arguments by name; positional ones are in the base's order."""
        if args or (input_ids is not None and self.base.main_input_name != "input_ids"):
            return by_name(self.base.forward, (input_ids, *args), kwargs)
        return kwargs if input_ids is None else {"input_ids": input_ids, **kwargs}
