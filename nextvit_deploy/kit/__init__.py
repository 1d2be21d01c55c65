"""A folder that finishes an engine's proof on the machine with the GPU, and what brings the result back."""
