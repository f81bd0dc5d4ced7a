"""What connects the island to other libraries."""
