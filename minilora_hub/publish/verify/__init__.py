"""Load a published adapter in a process without minilora_hub and compare its logits."""
