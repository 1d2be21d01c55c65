"""Export checks: a matrix of artefacts, each made or verified in a process of its own, judged against stated limits."""
