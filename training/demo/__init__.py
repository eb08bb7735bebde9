"""Pictures out of a seed: the demo data set, drawn."""
