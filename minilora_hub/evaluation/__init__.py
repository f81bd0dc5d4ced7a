"""What adapters are measured on, and how."""
