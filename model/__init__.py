"""The detector: the network, and how bytes become canvases and candidates become detections.

`types`, `image`, `suppress`, `metadata` and `detector` need no torch; the service uses only these.
`anchors`, `backbones`, `retinanet` and `candidates` need torch; training and export use them.
"""
