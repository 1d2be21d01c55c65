"""One page over a folder of artefacts: read what is recorded beside them, draw it, write it as one offline file."""
