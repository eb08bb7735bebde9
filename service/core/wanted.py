"""The comparison of the wanted model file with the one that serves: do they differ, and is it time to load?

A stamp tells one version of a file from the next; None stands for a file that is missing or cannot be read, which is a
wanted state too. For the loader's thread alone; knows neither clock nor disk.
"""

from dataclasses import dataclass

from model.files import Stamp

FIRST_RETRY_SECONDS = 5.0
LONGEST_RETRY_SECONDS = 300.0


@dataclass
class Wanted:
    """The file as it was seen, tried and loaded. All times are seconds of one monotonic clock."""

    served: Stamp
    """The version of the file that serves, before it was opened."""
    first_retry_seconds: float = FIRST_RETRY_SECONDS

    def __post_init__(self) -> None:
        self._tried = self._seen = self.served
        self._failures = 0
        self._retry_at = 0.0

    def is_due(self, stamp: Stamp, now: float) -> bool:
        """Decide whether to load now, after a look at the file.

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
        """Return the time until the next look; None: there is none. `poll_seconds` 0: only a failed file is retried."""
        waits = [poll_seconds] if poll_seconds else []
        if self._failures:
            waits.append(max(self._retry_at - now, 0.1))
        return min(waits, default=None)
