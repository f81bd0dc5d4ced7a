"""Import and export of other adapter and checkpoint formats."""
