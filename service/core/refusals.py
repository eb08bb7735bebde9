"""The errors that say: not now."""


class Refusal(Exception):
    """The service cannot take it now. Try again after `retry_after_seconds`, or another replica."""

    retry_after_seconds: int


class QueueFull(Refusal):
    """No place is free, or the wait would exceed the deadline. Try again after `retry_after_seconds`."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
