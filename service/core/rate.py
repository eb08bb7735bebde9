"""The rate at which the line drains, from which a wait is expected."""

NEWEST_SHARE = 0.2
"""Weight of the newest batch in the moving average."""


class DrainRate:
    """Averages the seconds that one canvas takes while the line is not empty. Runs overlap, and decoding may be slower
    than the device: what counts is how often one leaves. Times are time.monotonic()."""

    def __init__(self) -> None:
        self.seconds_per_canvas = 0.0
        self._since = 0.0

    def start(self, now: float) -> None:
        """The line was empty until now."""
        self._since = now

    def count(self, num_canvases: int, now: float) -> None:
        """So many have left the device."""
        newest = (now - self._since) / num_canvases
        average = self.seconds_per_canvas
        self.seconds_per_canvas = average + NEWEST_SHARE * (newest - average) if average else newest
        self._since = now
