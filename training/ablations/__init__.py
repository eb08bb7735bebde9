"""The worth of each part of the detector: one run without it, and a page of the comparisons."""
