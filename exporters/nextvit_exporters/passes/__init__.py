"""Graph rewrites on ``torch.fx``, one a file; the order they run in is written in each target's file."""
