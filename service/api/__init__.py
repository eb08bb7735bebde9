"""Bytes and JSON: HTTP in, HTTP out."""
