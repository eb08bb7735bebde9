"""LitServe: `python -m … WORKERS`, each a process with a model of its own, which decodes, runs and encodes in turn.

No batching: on a CPU a batch is no faster, and pictures differ in size. The API takes forms or JSON, no raw body.
"""

import sys
from typing import Any

import litserve
from fastapi import Request

from tests.benchmarks.peers.detection import Detection, port


class Api(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.detection = Detection()

    def decode_request(self, request: Request) -> bytes:
        """The annotation says that the request is wanted whole; LitServe then passes what its form holds."""
        return request["image"].file.read()  # type: ignore[no-any-return]

    def predict(self, data: bytes) -> dict[str, Any]:
        return self.detection(data)

    def encode_response(self, answer: dict[str, Any]) -> dict[str, Any]:
        return answer


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(api_path="/detect"),
        accelerator="cpu",
        devices=1,
        workers_per_device=int(sys.argv[1]),
        timeout=False,
    )
    server.run(host="127.0.0.1", port=port(), num_api_servers=1, log_level="warning", generate_client_file=False)
