"""Comparisons against a named baseline, interleaved in one run; each prints its ratio."""
