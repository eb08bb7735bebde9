"""Images: admitted, decoded, run, finished. Knows no HTTP."""
