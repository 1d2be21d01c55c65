"""Which blocks of a network stay in floating point, so that INT8 costs no more than was allowed."""
