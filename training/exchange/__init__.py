"""Weights in and out: torchvision's, other checkpoints', ONNX files."""
