"""The geometry of the demo data set's eight shapes: contours, clipping, area, covered pixels.

A shape is a tuple of contours, the outer one first and its holes after; a contour is [points, 2] (x, y) without a
repeated last point. Coordinates are continuous pixels: the centre of the top left pixel is (0.5, 0.5), and a picture
spans [0, width] x [0, height]. Curves are polygons, within 0.1 pixel of the curve at the largest size drawn.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

Contour = NDArray[np.float64]
Shape = tuple[Contour, ...]

_CURVE_POINTS = 96
_SUBPIXEL_BITS = 8


def _arc(radius: float, start: float, stop: float, centre_x: float = 0.0) -> Contour:
    angles = np.linspace(start, stop, _CURVE_POINTS, endpoint=False)
    return np.stack([centre_x + radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _circle(radius: float = 1.0) -> Contour:
    return _arc(radius, 0, 2 * np.pi)


def _star(num_points: int, inner_radius: float) -> Contour:
    angles = np.arange(2 * num_points) * np.pi / num_points - np.pi / 2
    radii = np.where(np.arange(2 * num_points) % 2 == 0, 1.0, inner_radius)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _cross(half_width: float) -> Contour:
    w = half_width
    corners = [
        (-w, -1),
        (w, -1),
        (w, -w),
        (1, -w),
        (1, w),
        (w, w),
        (w, 1),
        (-w, 1),
        (-w, w),
        (-1, w),
        (-1, -w),
        (-w, -w),
    ]
    return np.array(corners, dtype=np.float64)


def _heart() -> Contour:
    t = np.linspace(0, 2 * np.pi, _CURVE_POINTS, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -y / 16], axis=1)


def _crescent(bite_radius: float, bite_x: float) -> Contour:
    horn_x = (1 - bite_radius**2 + bite_x**2) / (2 * bite_x)
    horn_y = np.sqrt(1 - horn_x**2)
    outer = np.arctan2(horn_y, horn_x)
    inner = np.arctan2(horn_y, horn_x - bite_x)
    return np.concatenate(
        [_arc(1.0, outer, 2 * np.pi - outer), _arc(bite_radius, 2 * np.pi - inner, inner, centre_x=bite_x)]
    )


SHAPES: dict[str, Shape] = {
    "circle": (_circle(),),
    "square": (np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=np.float64),),
    "triangle": (np.array([(0, -1), (np.sqrt(3) / 2, 0.5), (-np.sqrt(3) / 2, 0.5)]),),
    "star": (_star(num_points=5, inner_radius=0.4),),
    "cross": (_cross(half_width=0.32),),
    "ring": (_circle(), _circle(0.58)),
    "heart": (_heart(),),
    "crescent": (_crescent(bite_radius=0.85, bite_x=0.42),),
}
"""Shapes around the origin, in units of their own, in the order of category ids, from 1."""


def place(shape: Shape, *, size: float, aspect: float, angle: float, centre: tuple[float, float]) -> Shape:
    """Stretch the shape to width : height = `aspect` and rotate it by `angle` radians. Then scale the longer side of
    its box to `size` pixels, and move the box's centre to `centre`.
    """
    stretch = np.array([np.sqrt(aspect), 1 / np.sqrt(aspect)])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    turned = [contour * stretch @ turn for contour in shape]
    low, high = turned[0].min(axis=0), turned[0].max(axis=0)
    scale = size / (high - low).max()
    return tuple((contour - (low + high) / 2) * scale + centre for contour in turned)


def clip(shape: Shape, width: int, height: int) -> Shape:
    """Clip the shape to the picture, without empty contours (Sutherland & Hodgman 1974)."""
    sides = [(0, 0.0, 1.0), (0, float(width), -1.0), (1, 0.0, 1.0), (1, float(height), -1.0)]
    clipped = []
    for contour in shape:
        for axis, bound, sign in sides:
            contour = _clip_side(contour, sign * (contour[:, axis] - bound))
        if len(contour):
            clipped.append(np.clip(contour, 0.0, (width, height)))  # crossings are rounded
    return tuple(clipped)


def _clip_side(contour: Contour, distances: NDArray[np.float64]) -> Contour:
    """Keep the part where `distances` [points], towards the inside of a line, are not negative."""
    inside = distances >= 0
    if inside.all():
        return contour
    following, following_distances = np.roll(contour, -1, axis=0), np.roll(distances, -1)
    crosses = inside != (following_distances >= 0)
    steps = np.where(crosses, distances - following_distances, 1.0)
    crossings = contour + (distances / steps)[:, None] * (following - contour)
    return np.asarray(np.stack([contour, crossings], axis=1)[np.stack([inside, crosses], axis=1)])


def area(shape: Shape) -> float:
    outer, *holes = [_contour_area(contour) for contour in shape]
    return outer - sum(holes)


def _contour_area(contour: Contour) -> float:
    x, y = contour.T
    return abs(float(x[:-1] @ y[1:] - y[:-1] @ x[1:] + x[-1] * y[0] - y[-1] * x[0])) / 2


def box(shape: Shape) -> tuple[float, float, float, float]:
    """Compute the exact box, xyxy, without a pixel grid."""
    (xmin, ymin), (xmax, ymax) = shape[0].min(axis=0), shape[0].max(axis=0)
    return float(xmin), float(ymin), float(xmax), float(ymax)


def coverage(shape: Shape, region: tuple[int, int, int, int]) -> NDArray[np.float32]:
    """Compute the share of each pixel of `region` (xyxy, whole pixels) that the shape covers, 0 to 1: [rows,
    columns]."""
    xmin, ymin, xmax, ymax = region
    columns, rows = xmax - xmin, ymax - ymin
    factor = 8 if max(columns, rows) <= 64 else 4
    fine = np.zeros((rows * factor, columns * factor), dtype=np.uint8)
    contours = [_fixed_point((contour - (xmin, ymin)) * factor) for contour in shape]
    cv2.fillPoly(fine, contours, 255, shift=_SUBPIXEL_BITS)
    return np.asarray(cv2.resize(fine, (columns, rows), interpolation=cv2.INTER_AREA) / np.float32(255))


def stroke(shape: Shape, region: tuple[int, int, int, int], thickness: int) -> NDArray[np.float32]:
    """Compute the coverage of a line of `thickness` pixels, centred on the contours."""
    xmin, ymin, xmax, ymax = region
    drawn = np.zeros((ymax - ymin, xmax - xmin), dtype=np.uint8)
    contours = [_fixed_point(contour - (xmin, ymin)) for contour in shape]
    cv2.polylines(drawn, contours, True, 255, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    return np.asarray(drawn / np.float32(255))


def _fixed_point(contour: Contour) -> NDArray[np.int32]:
    """Convert to OpenCV's fixed point, which counts from pixel centres, with `shift` bits of fraction."""
    return np.asarray(np.rint((contour - 0.5) * 2**_SUBPIXEL_BITS).astype(np.int32))
