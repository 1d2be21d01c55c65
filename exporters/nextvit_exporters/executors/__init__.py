"""What executes an artefact: real runtimes and reference executors, one contract."""
