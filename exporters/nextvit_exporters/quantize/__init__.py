"""INT8 with explicit steps: where they go, what they are, and the graph that carries them."""
