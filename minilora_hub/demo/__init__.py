"""The comparison page, in Gradio. The answers are computed by `minilora_hub.compare`."""
