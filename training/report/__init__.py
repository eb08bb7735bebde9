"""The report of a run: its metrics, its validation, its page."""
