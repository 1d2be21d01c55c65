"""Everything that knows TensorRT: backends, builder, parsed network, what an engine file says of itself."""
