"""Other dialects of adapters, one file each."""
