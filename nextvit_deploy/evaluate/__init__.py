"""What an artefact's precision costs over a whole folder of pictures, and the pool of workers that shares such work."""
