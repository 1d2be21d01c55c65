"""A user's own preprocessing held against what a checkpoint wants, step by step."""
