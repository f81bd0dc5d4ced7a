"""The remote code: the files that are copied, unchanged, into every published adapter repo.

They need torch, transformers and safetensors only, never import minilora_hub, and import each other with one-line
relative imports, because transformers finds them by reading those lines.
"""
