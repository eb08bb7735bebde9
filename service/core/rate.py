"""The rate at which the line drains, from which a wait is expected."""

NEWEST_SHARE = 0.2
"""Weight of the newest batch in the moving averages."""


class DrainRate:
    """Averages the seconds that one picture takes while the line is not empty, and those that the device takes for one
    canvas. Runs overlap, and decoding may be slower than the device: of pictures counts how often one leaves. A picture
    with tiles is decoded once; what each of its windows adds is a canvas. Times are time.monotonic()."""

    def __init__(self) -> None:
        self.seconds_per_picture = 0.0
        self.seconds_per_window = 0.0
        self._since = 0.0

    def start(self, now: float) -> None:
        """The line was empty until now."""
        self._since = now

    def seconds(self, num_pictures: int, num_windows: int) -> float:
        """Seconds until so many pictures have left, and so many windows beside one canvas of each."""
        return num_pictures * self.seconds_per_picture + num_windows * self.seconds_per_window

    def count(self, num_canvases: int, now: float, started: float, runs: int) -> None:
        """So many have left the device, by a run that started then, one of so many side by side."""
        self.seconds_per_picture = _moved(self.seconds_per_picture, (now - self._since) / num_canvases)
        self.seconds_per_window = _moved(self.seconds_per_window, (now - started) / num_canvases / runs)
        self._since = now


def _moved(average: float, newest: float) -> float:
    return average + NEWEST_SHARE * (newest - average) if average else newest
