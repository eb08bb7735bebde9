"""To look at a run: its figures, its validation, its page."""
