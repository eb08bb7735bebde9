"""A search for the costliest picture under the limits: `python -m tests.search`. What it finds is to be bounded."""
