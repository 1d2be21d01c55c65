"""What turns a float graph into one of lower precision."""
