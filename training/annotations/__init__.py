"""The reading of a COCO annotation file, which training and evaluation share."""
