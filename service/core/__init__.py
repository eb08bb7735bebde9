"""The core: admits, decodes, runs and finishes images. Knows no HTTP."""
