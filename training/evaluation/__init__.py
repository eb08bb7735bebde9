"""The quality of detections: COCO's average precision, and figures that explain it."""
