"""The REST service: an ONNX detector behind `POST /detect`, with back-pressure, draining and Prometheus metrics."""
