"""Import and export of weights: torchvision's, other checkpoints', ONNX files."""
