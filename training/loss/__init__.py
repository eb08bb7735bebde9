"""The loss of a step: which anchors belong to which object, and what their predictions cost."""
