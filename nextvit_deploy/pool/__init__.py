"""Independent tasks, shared among processes here or on a Ray cluster."""
