"""The demo pictures without their objects: background and clutter before them, light, blur and noise after.

Pictures are RGB uint8 [height, width, 3]. All randomness comes from the generator passed in. Clutter resembles none of
the eight shapes: thin curves, specks below the smallest object, ragged polygons, letters that resemble no shape.
"""

import statistics

import cv2
import numpy as np
from numpy.typing import NDArray

from model.types import Pixels

Field = NDArray[np.float32]
"""[height, width] or [height, width, 3], values about -1 to 1."""

_LETTERS = "BEFGHKMNPRSWZ2357"
_FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_TRIPLEX)
_NORMAL_QUANTILES = np.array([statistics.NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])


def ramp(rng: np.random.Generator, height: int, width: int) -> Field:
    """Make a ramp from -1 to 1 in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    x = np.linspace(-1, 1, width, dtype=np.float32) * np.float32(np.cos(angle))
    y = np.linspace(-1, 1, height, dtype=np.float32) * np.float32(np.sin(angle))
    return np.asarray((x + y[:, None]) / np.float32(abs(np.cos(angle)) + abs(np.sin(angle))), dtype=np.float32)


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> Field:
    """Make noise with one random value and colour about every `cell` pixels, smooth between."""
    rows, columns = int(height / cell) + 2, int(width / cell) + 2
    grid = rng.uniform(-1, 1, (rows, columns, 1)) * 0.7 + rng.uniform(-1, 1, (rows, columns, 3)) * 0.3
    return np.asarray(cv2.resize(grid.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC))


def stripes(rng: np.random.Generator, height: int, width: int, period: float) -> Field:
    """Make waves of `period` pixels with more or less sharp edges, in a random direction."""
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    x = np.arange(width, dtype=np.float32) * np.float32(np.cos(angle) * 2 * np.pi / period)
    y = np.arange(height, dtype=np.float32) * np.float32(np.sin(angle) * 2 * np.pi / period) + np.float32(phase)
    return np.clip(np.sin(x + y[:, None]) * np.float32(rng.uniform(1, 4)), -1, 1)


def random_colours(rng: np.random.Generator, num_colours: int, saturation: float, value: float) -> NDArray[np.float32]:
    """Draw colours [num_colours, 3] RGB, 0 to 255, of any hue; saturation at most and value at least as given (0 to
    1)."""
    hsv = np.stack(
        [rng.uniform(0, 360, num_colours), rng.uniform(0, saturation, num_colours), rng.uniform(value, 1, num_colours)],
        axis=1,
    )
    return np.asarray(cv2.cvtColor(hsv.astype(np.float32)[None], cv2.COLOR_HSV2RGB)[0] * 255)


def draw_background(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Draw a plain, graded, noisy, striped or checked background, half of the time with clutter."""
    ground = _draw_ground(rng, height // 2, width // 2)  # soft enough to be drawn at half the size
    pixels = np.asarray(cv2.resize(ground, (width, height), interpolation=cv2.INTER_LINEAR))
    if rng.random() < 0.5:
        _draw_clutter(rng, pixels)
    return pixels


def _draw_ground(rng: np.random.Generator, height: int, width: int) -> Pixels:
    colour, towards = random_colours(rng, 2, saturation=0.7, value=0.25)
    kind = rng.choice(["plain", "ramp", "noise", "stripes", "checks"], p=[0.12, 0.22, 0.36, 0.15, 0.15])
    ground = np.broadcast_to(colour, (height, width, 3))
    if kind == "ramp":
        ground = ground + (towards - colour) * (ramp(rng, height, width)[:, :, None] * 0.5 + 0.5)
    elif kind == "noise":
        for cell, contrast in ((rng.uniform(40, 150), 60), (rng.uniform(10, 40), 30), (rng.uniform(2, 6), 18)):
            ground = ground + smooth_noise(rng, height, width, cell) * np.float32(contrast * rng.uniform(0, 1))
    elif kind == "stripes":
        ground = ground + stripes(rng, height, width, rng.uniform(5, 45))[:, :, None] * _tint(rng)
    elif kind == "checks":
        ground = ground + _checks(rng, height, width, rng.uniform(6, 45))[:, :, None] * _tint(rng)
    return np.asarray(np.clip(ground, 0, 255).astype(np.uint8))


def _tint(rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw the distance of a pattern's two colours from their mean, in levels."""
    return (rng.uniform(4, 22) * rng.uniform(0.5, 1, 3)).astype(np.float32)


def _checks(rng: np.random.Generator, height: int, width: int, period: float) -> Field:
    angle = rng.uniform(0, np.pi / 2)
    frequency, sharpness = 2 * np.pi / period, rng.uniform(1, 4)
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    c, s = np.float32(np.cos(angle) * frequency), np.float32(np.sin(angle) * frequency)
    return np.clip(np.sin(x * c + y * s) * np.sin(y * c - x * s) * np.float32(sharpness), -1, 1)


def _draw_clutter(rng: np.random.Generator, pixels: Pixels) -> None:
    for draw, most in ((_draw_ragged_polygon, 4), (_draw_curve, 5), (_draw_letter, 6), (_draw_speck, 40)):
        if rng.random() < 0.5:
            for colour in random_colours(rng, int(rng.integers(1, most + 1)), saturation=0.9, value=0.1):
                draw(rng, pixels, (float(colour[0]), float(colour[1]), float(colour[2])))


def _random_point(rng: np.random.Generator, pixels: Pixels) -> NDArray[np.float64]:
    height, width, _ = pixels.shape
    return rng.uniform(0, 1, 2) * (width, height)


def _draw_ragged_polygon(rng: np.random.Generator, pixels: Pixels, colour: tuple[float, float, float]) -> None:
    num_points = int(rng.integers(9, 14))
    angles = (np.arange(num_points) + rng.uniform(-0.45, 0.45, num_points)) * 2 * np.pi / num_points
    radii = rng.uniform(10, 70) * rng.choice([0.3, 0.5, 0.75, 1.0], num_points)
    points = _random_point(rng, pixels) + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    cv2.fillPoly(pixels, [np.rint(points).astype(np.int32)], colour, cv2.LINE_AA)


def _draw_curve(rng: np.random.Generator, pixels: Pixels, colour: tuple[float, float, float]) -> None:
    headings = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.25, 24))
    steps = rng.uniform(4, 20) * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    points = _random_point(rng, pixels) + np.cumsum(steps, axis=0)
    cv2.polylines(pixels, [np.rint(points).astype(np.int32)], False, colour, int(rng.integers(1, 3)), cv2.LINE_AA)


def _draw_letter(rng: np.random.Generator, pixels: Pixels, colour: tuple[float, float, float]) -> None:
    x, y = _random_point(rng, pixels)
    text = "".join(rng.choice(list(_LETTERS), int(rng.integers(1, 5))))
    font = _FONTS[rng.integers(len(_FONTS))]
    cv2.putText(pixels, text, (int(x), int(y)), font, rng.uniform(0.4, 1.8), colour, 1, cv2.LINE_AA)


def _draw_speck(rng: np.random.Generator, pixels: Pixels, colour: tuple[float, float, float]) -> None:
    x, y = _random_point(rng, pixels)
    cv2.circle(pixels, (int(x), int(y)), int(rng.integers(1, 3)), colour, -1, cv2.LINE_AA)


def photograph(rng: np.random.Generator, pixels: Pixels, most_blur: float) -> Pixels:
    """Add uneven light, blur of a sigma up to `most_blur` pixels, and sensor noise, each to some pictures."""
    height, width, _ = pixels.shape
    if rng.random() < 0.7:
        dark, bright = sorted(rng.uniform(0.6, 1.2, 2))
        light = (dark + (bright - dark) * (ramp(rng, height, width) * 0.5 + 0.5)) * 200
        pixels = cv2.multiply(pixels, cv2.cvtColor(light.astype(np.uint8), cv2.COLOR_GRAY2RGB), scale=1 / 200)
    if rng.random() < 0.4:
        pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.2, most_blur))
    if rng.random() < 0.5:
        pixels = _add_noise(rng, pixels, sigma=rng.uniform(1, 8))
    return pixels


def _add_noise(rng: np.random.Generator, pixels: Pixels, sigma: float) -> Pixels:
    """Add Gaussian noise in whole levels: reading a table of its quantiles is cheaper than normal variates."""
    table = np.rint(_NORMAL_QUANTILES * sigma).astype(np.int8)
    noise = cv2.LUT(np.frombuffer(rng.bytes(pixels.size), dtype=np.uint8).reshape(pixels.shape), table)
    return np.asarray(cv2.add(pixels, noise, dtype=cv2.CV_8U))
