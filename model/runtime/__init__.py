"""The interface to the device, and the choice of the device, which is made here alone."""

import logging
from typing import Literal

import onnxruntime as ort

from model.metadata import ModelMetadata
from model.runtime.cpu import cpu_runtime
from model.runtime.cuda import cuda_runtime
from model.runtime.session import DeviceUnavailable, Runtime, has_cuda_build, one_line

logger = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]


def open_runtime(
    model: bytes,
    session: ort.InferenceSession,
    metadata: ModelMetadata,
    *,
    device: Device,
    threads: int,
    gpu_memory_limit_bytes: int | None,
    runs_at_once: int | None,
) -> tuple[Runtime, bool]:
    """Open a file on the given device. True: `auto` tried CUDA and could not use it.

    `session` is the file opened on `threads` of the CPU. DeviceUnavailable: `cuda` was asked for and cannot be used.
    """
    fell_back = False
    if device == "cuda" and not has_cuda_build():
        raise DeviceUnavailable("this ONNX Runtime is built without CUDA: install retinaserve[gpu] and no [cpu]")
    if device != "cpu" and has_cuda_build():
        try:
            runtime = cuda_runtime(model, metadata, limit_bytes=gpu_memory_limit_bytes, lanes=runs_at_once)
            _tell_of_the_form(metadata, runtime)
            return runtime, False
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            if device == "cuda":
                raise DeviceUnavailable(f"model {metadata.name} cannot run on CUDA: {one_line(error)}") from error
            logger.warning("CUDA cannot be used, model %s runs on the CPU: %s", metadata.name, one_line(error))
            fell_back = True
    return cpu_runtime(model, session, metadata.resize, threads=threads, runs_at_once=runs_at_once), fell_back


def _tell_of_the_form(metadata: ModelMetadata, runtime: Runtime) -> None:
    if metadata.precision == "int8":
        logger.warning(
            "model %s is int8, for which CUDA has no kernels: slower than fp32, export it as fp16", metadata.name
        )
    if metadata.made_for == "cpu":
        logger.warning("model %s is made for CPUs and slow on CUDA: export it without --for cpu", metadata.name)
    if metadata.precision == "fp32" and runtime.tf32:
        logger.info("model %s computes its fp32 convolutions in TF32, with 10 bits of mantissa", metadata.name)
