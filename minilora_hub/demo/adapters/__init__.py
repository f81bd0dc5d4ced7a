"""The adapters that the page offers."""
