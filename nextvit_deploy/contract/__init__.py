"""Compare a preprocessing someone wrote with what a checkpoint was trained on, and name the step that differs."""
