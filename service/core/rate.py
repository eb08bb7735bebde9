"""The rate at which the line drains, which gives the expected wait."""

NEWEST_SHARE = 0.2
"""Weight of the newest batch in the moving averages."""


class DrainRate:
    """Averages the seconds between two pictures that leave a line that is not empty, and the seconds per canvas.

    Runs overlap, and decoding may be slower than the device, so pictures count by how often one leaves. A picture with
    tiles is decoded once, and each of its windows adds a canvas. Times are time.monotonic()."""

    def __init__(self) -> None:
        self.seconds_per_picture = 0.0
        self.seconds_per_window = 0.0
        self._since = 0.0

    def start(self, now: float) -> None:
        """Note that the line was empty until now."""
        self._since = now

    def seconds(self, num_pictures: int, num_windows: int) -> float:
        """Return the seconds until so many pictures have left, and so many windows beyond one canvas of each."""
        return num_pictures * self.seconds_per_picture + num_windows * self.seconds_per_window

    def count(self, num_canvases: int, now: float, started: float, runs: int) -> None:
        """Count so many canvases that left the device, in a run that started then, one of so many concurrent runs."""
        self.seconds_per_picture = _moved(self.seconds_per_picture, (now - self._since) / num_canvases)
        self.seconds_per_window = _moved(self.seconds_per_window, (now - started) / num_canvases / runs)
        self._since = now


def _moved(average: float, newest: float) -> float:
    return average + NEWEST_SHARE * (newest - average) if average else newest
