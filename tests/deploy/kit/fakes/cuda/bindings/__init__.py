"""In front of the real package where this folder is on PYTHONPATH."""
