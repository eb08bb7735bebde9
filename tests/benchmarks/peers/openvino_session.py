"""OpenVINO on one canvas, for cpu.py: `python openvino_session.py MODEL.onnx INPUTS.npz THREADS`.

For each line on standard input it infers once and prints the seconds; the first line that it prints says that it is
ready. The shape is fixed, which suits OpenVINO best, and so is f32: its default on some CPUs is bf16.
"""

import sys
import time

import numpy as np
import openvino

model_file, inputs_file, threads = sys.argv[1:]
inputs = dict(np.load(inputs_file))
core = openvino.Core()
model = core.read_model(model_file)
model.reshape({name: value.shape for name, value in inputs.items()})
precision_and_threads = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": int(threads)}
compiled = core.compile_model(model, "CPU", {**precision_and_threads, "PERFORMANCE_HINT": "LATENCY"})
request = compiled.create_infer_request()
print("ready", flush=True)
for _ in sys.stdin:
    started = time.perf_counter()
    request.infer(inputs)
    print(time.perf_counter() - started, flush=True)
