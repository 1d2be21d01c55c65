"""Next-ViT as the paper writes it, and the checkpoints it was trained into.

This package knows nothing of export. Source: Li et al., "Next-ViT: Next Generation Vision Transformer for
Efficient Deployment in Realistic Industrial Scenarios", arXiv 2207.05501.
"""
