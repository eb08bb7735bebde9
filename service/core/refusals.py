"""The kind of error that says: not now."""


class Refusal(Exception):
    """The service cannot take it now. Try again after `retry_after_seconds`, or another replica."""

    retry_after_seconds: int
