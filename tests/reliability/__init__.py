"""The gates at length: `python -m tests.reliability`. Their code is that of the short tests, with larger numbers."""
