"""PyTriton: Triton's HTTP frontend and scheduler before two Python instances, so that one request is decoded while the
other is inferred.

The picture is one BYTES tensor and so is the answer's JSON. Triton's dynamic batcher is on without delay, as its guide
begins; what it batches is inferred one by one, since on a CPU a batch is no faster and pictures differ in size.
"""

import json
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from tests.benchmarks.peers.detection import Detection, port

detection = Detection()


@batch  # type: ignore[untyped-decorator]
def infer(image: Any) -> list[Any]:
    answers = [json.dumps(detection(bytes(data))).encode() for [data] in image]
    return [np.array(answers, object)[:, None]]


if __name__ == "__main__":
    config = TritonConfig(http_address="127.0.0.1", http_port=port(), allow_grpc=False, allow_metrics=False)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="detect",
            infer_func=[infer, infer],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="answer", dtype=bytes, shape=(1,))],
            config=ModelConfig(max_batch_size=2, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.serve()
