"""What runs an engine on a GPU: the driver, memory, streams and the plan of the buffers; none of it needs torch."""
