"""The service on several machines, with Ray: `serve` answers requests, `batch` processes archives.

Needs the extra `ray`, which the service does not need.
"""
