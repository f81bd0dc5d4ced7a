"""The page: Gradio and nothing else. What it shows is computed in `minilora_hub.compare`."""
