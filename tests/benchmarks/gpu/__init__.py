"""The detector on this machine's GPU: agreement with the CPU, and speed. See __main__."""
