"""The demo data set, drawn from a seed."""
