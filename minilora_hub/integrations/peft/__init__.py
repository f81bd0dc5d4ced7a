"""MixLoRA as a PEFT method."""
