"""The page itself, in Gradio."""
