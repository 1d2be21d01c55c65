"""Where an artefact and PyTorch part: layer by layer, named by the model's own modules."""
