"""Four 3x3 layers of 256 channels with ReLU at P3's size: `Conv`, the form for CPUs, and ncnn's own Winograd.

    python -m pip install ncnn    # not among this repository's packages
    python -m tests.benchmarks.winograd_layers [--rounds N] [--size HEIGHT WIDTH]

In turns, fp32, random numbers. Prints a markdown table; nothing else should run on the machine. Half a minute.
"""

import argparse
import functools
import importlib
import struct
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from model.detector import available_cores
from tests.benchmarks.measuring import command, interleaved, machine, table
from training.exchange.winograd import to_winograd

LAYERS, CHANNELS = 4, 256
Weights = tuple[NDArray[np.float32], NDArray[np.float32]]
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def graph(weights: list[Weights]) -> onnx.ModelProto:
    nodes, constants, before = [], [], "x"
    for number, (weight, bias) in enumerate(weights):
        names = [f"weight{number}", f"bias{number}"]
        constants += [numpy_helper.from_array(each, name) for each, name in zip((weight, bias), names, strict=True)]
        nodes += [
            helper.make_node("Conv", [before, *names], [f"sum{number}"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"sum{number}"], [f"map{number}"]),
        ]
        before = f"map{number}"
    image, result = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", CHANNELS, "h", "w"]) for name in ("x", before)
    )
    layers = helper.make_graph(nodes, "layers", [image], [result], constants)
    return helper.make_model(layers, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def on_onnx_runtime(model: onnx.ModelProto) -> Run:
    options = ort.SessionOptions()
    options.intra_op_num_threads = available_cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the next in turn needs the cores
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda image: np.asarray(session.run(None, {"x": image[None]})[0][0])


def on_ncnn(weights: list[Weights]) -> Run:
    ncnn: Any = importlib.import_module("ncnn")
    lines = ["7767517", f"{LAYERS + 1} {LAYERS + 1}", "Input x 0 1 map"]
    blobs = ["map", *(f"map{number}" for number in range(LAYERS))]
    sizes = f"0={CHANNELS} 1=3 4=1 5=1 6={CHANNELS * CHANNELS * 9} 9=1"  # padding 1, a bias, ReLU
    lines += [f"Convolution {after} 1 1 {before} {after} {sizes}" for before, after in pairwise(blobs)]
    net = ncnn.Net()
    net.opt.num_threads, net.opt.openmp_blocktime = available_cores(), 0
    for half in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{half}", False)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "param").write_text("\n".join(lines) + "\n")
        (Path(folder) / "bin").write_bytes(
            b"".join(struct.pack("I", 0) + weight.tobytes() + bias.tobytes() for weight, bias in weights)
        )
        if net.load_param(f"{folder}/param") or net.load_model(f"{folder}/bin"):
            raise SystemExit("ncnn does not read the layers")

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        extractor = net.create_extractor()
        extractor.input("map", ncnn.Mat(image))
        return np.array(extractor.extract(blobs[-1])[1])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="[15]")
    parser.add_argument("--size", type=int, nargs=2, default=(100, 136), metavar=("HEIGHT", "WIDTH"), help="[100 136]")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = [
        (rng.normal(0, 0.03, (CHANNELS, CHANNELS, 3, 3)).astype(np.float32), rng.normal(0, 0.1, CHANNELS).astype("f4"))
        for _ in range(LAYERS)
    ]
    image = rng.normal(size=(CHANNELS, *options.size)).astype(np.float32)
    plain = graph(weights)
    runs = {
        "ONNX Runtime's Conv": on_onnx_runtime(plain),
        "`--for cpu`": on_onnx_runtime(to_winograd(plain, options.size)),
        "ncnn": on_ncnn(weights),
    }
    answers = [run(image) for run in runs.values()]
    differences = [np.abs(answer - answers[0]).max() / np.abs(answers[0]).max() for answer in answers]
    seconds = interleaved(options.rounds, *(functools.partial(run, image) for run in runs.values()))
    rows = [
        (name, f"{taken / LAYERS * 1000:.1f}", f"{seconds[0] / taken:.2f}", f"{difference:.1e}")
        for name, taken, difference in zip(runs, seconds, differences, strict=True)
    ]
    print(
        f"{machine()}; medians of {options.rounds} interleaved rounds, {command('tests.benchmarks.winograd_layers')}\n"
    )
    print(table(["layers by", "ms a layer", "times as fast", "largest difference, of the largest value"], rows))


if __name__ == "__main__":
    main()
