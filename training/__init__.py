"""Training: makes a RetinaNet checkpoint of a COCO-format data set, its AP, and the ONNX file that the service
loads."""
