"""Plain FastAPI: the work in its thread pool, the raw body in, JSON out."""

from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

from tests.benchmarks.peers.detection import Detection, port

detection = Detection()
app = FastAPI()


@app.post("/detect", response_model=None)
async def detect(request: Request) -> dict[str, Any]:
    return await run_in_threadpool(detection, await request.body())


if __name__ == "__main__":
    uvicorn.run(app, port=port(), log_level="warning", access_log=False)
