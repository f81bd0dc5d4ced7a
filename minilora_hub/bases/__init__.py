"""Base models: a name becomes a folder, a skeleton without weights, or a loaded model."""

from minilora_hub.bases.resolving import EMBEDDED as EMBEDDED
from minilora_hub.bases.resolving import ResolvedBase as ResolvedBase
from minilora_hub.bases.resolving import resolve_base as resolve_base
