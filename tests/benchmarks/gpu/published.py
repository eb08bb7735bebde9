"""The section `published`: what others have measured on GPUs, to see ours beside it."""

from tests.benchmarks.gpu.plan import Plan
from tests.benchmarks.gpu.report import Report


def published(plan: Plan, report: Report) -> None:
    report.table("images/s", "hardware", "software and precision", "model and input", "how it differs from ours")
    report.add("1,877", "one H200 of eight, offline", "MLPerf Inference v4.1 (v5.1: 1,875), TensorRT, INT8",
               "RetinaNet ResNeXt-50, 264 classes, 800×800", "INT8; another backbone, more classes, a smaller canvas; "
               "no decoding of JPEGs, no HTTP; batch 48")  # fmt: skip
    report.add("1,801", "one H100-SXM of eight, offline", "MLPerf Inference v4.1, TensorRT 10.2, INT8",
               "RetinaNet ResNeXt-50, 264 classes, 800×800", "as above")  # fmt: skip
    report.add("76", "one RTX 4090, offline", "MLPerf Inference v5.1, ONNX Runtime CUDA, fp32",
               "RetinaNet ResNeXt-50, 264 classes, 800×800", "the same runtime; another card, another backbone, "
               "more classes, a smaller canvas; no JPEGs, no HTTP")  # fmt: skip
    report.add("93", "one A100, batch 1", "ODTK, TensorRT, FP16", "RetinaNet ResNet-50, 80 classes, 800 to 1280",
               "latency of one image (10.8 ms) turned into a rate; pictures padded to multiples of 128")  # fmt: skip
    report.note("published by their authors, not measured here")
