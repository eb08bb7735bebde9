"""What each part of the detector is worth: one run without it, and a page of the comparisons."""
