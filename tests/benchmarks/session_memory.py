"""The bare session's memory, for cpu.py: `python session_memory.py MODEL.onnx THREADS INPUTS.npz ...`.

Opens the file with ONNX Runtime's defaults, runs all inputs, prints the resident bytes. Imports nothing of ours.
"""

import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for inputs in sys.argv[3:]:
    session.run(None, dict(np.load(inputs)))
pages = int(Path("/proc/self/statm").read_text().split()[1])
print(pages * os.sysconf("SC_PAGE_SIZE"))
