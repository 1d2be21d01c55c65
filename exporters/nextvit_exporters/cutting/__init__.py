"""A piece of a saved artefact, as a small file of the same format that runs alone."""
