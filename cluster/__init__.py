"""The service beyond one machine, on Ray: `serve` answers requests, `batch` goes through archives.

Needs the extra `ray`, which the service does without.
"""
