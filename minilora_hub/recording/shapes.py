"""Which tensors an adapter must have: those that its configuration and the structure of its base imply.

The island's own plan says it, from a model that is loaded (`shapes_of_model`), or from the structure that `text_config`
describes, without the base's weights (`expected_shapes`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RENAMED = ("architectures", "auto_map", "base_model_name_or_path", "base_model_revision")
"""What publishing sets in a configuration: no tensor follows from it, and each has a check of its own."""


@dataclass(frozen=True)
class Shapes:
    """The tensors of one configuration on its base.

    Attributes:
        config: what config.json held when the model was loaded from it.
        tensors: ``{canonical name: shape}``.
        layers_path: where the base has its layers.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    layers_path: str

    def follow_from(self, config: Mapping[str, Any]) -> bool:
        """Whether a configuration is the one that these were made from, but for the names that publishing sets."""
        return _without(config, RENAMED) == _without(self.config, RENAMED)


def shapes_of_model(model: Any, config: Mapping[str, Any]) -> Shapes | None:
    """Return the tensors of a loaded model; None where `config` describes another base than the model has.

    Args:
        model: the model, with its adapter on its real base.
        config: what the config.json held that it was loaded from.
    """
    from minilora_hub.remote_code.attach import expected_tensors
    from minilora_hub.remote_code.base_structure import find_decoder_layers

    described, real = config.get("text_config"), json.loads(model.config.to_json_string())["text_config"]
    # In which dtype the base lies in memory here has nothing to do with its structure.
    if not isinstance(described, dict) or _without(described, ["dtype"]) != _without(real, ["dtype"]):
        return None
    tensors = dict(expected_tensors(model.config, model.sites))
    return Shapes(config, tensors, find_decoder_layers(model.base)[0])


def expected_shapes(config: Any) -> tuple[dict[str, tuple[int, ...]] | None, str, str]:
    """``{name: shape}`` of every tensor, the path of the base's layers, and why not where it cannot be known."""
    from minilora_hub.bases.skeleton import skeleton
    from minilora_hub.remote_code.attach import expected_tensors
    from minilora_hub.remote_code.base_structure import find_decoder_layers, plan_sites

    try:
        base = skeleton(config.text_config, blocks=config.model_type == "mixlora")
        return dict(expected_tensors(config, plan_sites(base, config))), find_decoder_layers(base)[0], ""
    except Exception as error:  # another library's code over settings from outside: anything can happen
        return None, "", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _without(fields: Mapping[str, Any], names: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
