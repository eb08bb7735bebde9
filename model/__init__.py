"""The detector: the network, the way from bytes to canvases, and the way from candidates to detections.

`types`, `image`, `suppress`, `metadata` and `detector` need no torch; the service uses only these.
`anchors`, `backbones`, `retinanet` and `candidates` need torch; training and export use them.
"""
