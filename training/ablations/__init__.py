"""Ablations: training runs that differ in one part of the detector, and a page that compares them."""
