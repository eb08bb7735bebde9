"""What the detector does on the GPU at hand: whether it answers as on the CPU, and how fast. See __main__."""
