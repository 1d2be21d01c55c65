"""The compiler: graph rewrites, one file per target, and the executors that prove what was written."""
