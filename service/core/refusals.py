"""The errors of a service that cannot take a request now."""


class Refusal(Exception):
    """The service cannot take the request now. Try again after `retry_after_seconds`, or try another replica."""

    retry_after_seconds: int


class QueueFull(Refusal):
    """No place is free, or the wait would exceed the deadline. Try again after `retry_after_seconds`."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
