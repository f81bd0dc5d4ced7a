"""The Gradio components of the page."""
