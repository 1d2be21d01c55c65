"""Core ML: how packages are converted, written, read strictly, compressed and looked at."""
