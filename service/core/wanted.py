"""The model file that is wanted against the one that serves: do they differ, and is it time to load?

A file is known by its stamp, what tells one version from the next. None is a file that is missing or cannot be looked
at, and is as much a wanted state as any other. One thread, the loader's; knows neither clock nor disk.
"""

from dataclasses import dataclass

from model.files import Stamp

FIRST_RETRY_SECONDS = 5.0
LONGEST_RETRY_SECONDS = 300.0


@dataclass
class Wanted:
    """The file as it was seen, tried and loaded; all times are of one monotonic clock, in seconds."""

    served: Stamp
    """The version of the file that serves, before it was opened."""
    first_retry_seconds: float = FIRST_RETRY_SECONDS

    def __post_init__(self) -> None:
        self._tried = self._seen = self.served
        self._failures = 0
        self._retry_at = 0.0

    def is_due(self, stamp: Stamp, now: float) -> bool:
        """Decide whether to load now, having looked at the file.

        It must differ from what serves, be the same as at the last look (half-copied files are left alone), and not
        have been tried yet, or have failed long enough ago.
        """
        settled = stamp == self._seen
        if stamp == self.served:
            self._failures = 0
        self._seen = stamp
        return settled and stamp != self.served and (stamp != self._tried or now >= self._retry_at)

    def loaded(self, stamp: Stamp) -> None:
        self.served = self._tried = stamp
        self._failures = 0

    def failed(self, stamp: Stamp, now: float) -> None:
        """Note a failure. The wait doubles with each of the same file."""
        self._failures = self._failures + 1 if stamp == self._tried else 1
        self._tried = stamp
        self._retry_at = now + min(self.first_retry_seconds * 2 ** (self._failures - 1), LONGEST_RETRY_SECONDS)

    def seconds_to_wait(self, poll_seconds: float, now: float) -> float | None:
        """Time until the next look; None: for ever. `poll_seconds` 0: only what failed is looked at again."""
        waits = [poll_seconds] if poll_seconds else []
        if self._failures:
            waits.append(max(self._retry_at - now, 0.1))
        return min(waits, default=None)
