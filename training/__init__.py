"""From a COCO-format data set to a RetinaNet checkpoint, its AP, and the ONNX file that the service loads."""
