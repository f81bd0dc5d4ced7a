"""The evaluation tasks: items made from language data."""
