"""How good detections are: COCO's average precision, and what explains it."""
