"""The Open Inference Protocol v2 over HTTP, as Triton's and KServe's clients speak it."""
