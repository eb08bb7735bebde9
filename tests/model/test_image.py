import contextlib
import io
import struct
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from model.image import InvalidImage, TooManyPixels, decode_image, resized_size, to_canvas, to_original
from model.metadata import ResizePolicy
from model.types import CanvasImage, Detections, Pixels
from tests.support.pictures import encode, picture, png

POLICY = ResizePolicy()


def torchvision_resize(image: Pixels, policy: ResizePolicy) -> np.ndarray:
    transform = GeneralizedRCNNTransform(policy.shorter_side, policy.longest_side, [0.0] * 3, [1.0] * 3)
    resized, _ = transform.resize(torch.from_numpy(image).permute(2, 0, 1).float(), None)
    return resized.permute(1, 2, 0).numpy()


# Decoding


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_keep_every_pixel(file_format: str) -> None:
    np.testing.assert_array_equal(decode_image(encode(picture(), file_format)), picture())


def test_lossless_webp_keeps_every_pixel() -> None:
    np.testing.assert_array_equal(decode_image(encode(picture(), "WEBP", lossless=True)), picture())


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "AVIF"])
def test_lossy_formats_come_near(file_format: str) -> None:
    assert np.abs(decode_image(encode(picture(), file_format)).astype(int) - picture()).mean() < 6


@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 90, "progressive": True}, {"subsampling": 0}])
def test_jpeg_equals_pillows_decoder(options: dict[str, object]) -> None:
    data = encode(picture(), "JPEG", **options)
    assert np.abs(decode_image(data).astype(int) - np.asarray(Image.open(io.BytesIO(data)))).max() <= 1


def test_jpeg_with_a_second_picture_inside_is_its_first() -> None:
    second = Image.fromarray(picture(seed=1))
    data = encode(picture(), "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(decode_image(data).astype(int) - picture()).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_is_applied_as_pillow_does(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), file_format, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.abs(decode_image(data).astype(int) - expected).max() <= 1


def test_damaged_exif_counts_as_none() -> None:
    data = encode(picture(), "PNG", exif=b"Exif\x00\x00 no TIFF header")
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(data)).getexif()
    np.testing.assert_array_equal(decode_image(data), picture())


def test_orientation_beyond_the_eight_counts_as_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    np.testing.assert_array_equal(decode_image(encode(picture(), "PNG", exif=exif)), picture())


def test_alpha_is_dropped_and_the_colour_under_it_kept() -> None:
    alpha = np.zeros((60, 80, 1), np.uint8)
    np.testing.assert_array_equal(decode_image(encode(np.concatenate([picture(), alpha], axis=2), "PNG")), picture())


def test_grey_with_alpha_becomes_grey_rgb() -> None:
    grey = picture()[:, :, 0]
    decoded = decode_image(encode(Image.merge("LA", [Image.fromarray(grey)] * 2), "PNG"))
    np.testing.assert_array_equal(decoded, np.stack([grey] * 3, axis=2))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_high_byte(file_format: str) -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (60, 80), dtype=np.uint16)
    decoded = decode_image(encode(Image.fromarray(samples), file_format))
    np.testing.assert_array_equal(decoded, np.stack([samples >> 8] * 3, axis=2))


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4)])
def test_16_bit_colours_keep_their_high_byte(colour_type: int, channels: int) -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (60, 80, channels), dtype=np.uint16)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in samples)
    np.testing.assert_array_equal(decode_image(png(80, 60, 16, colour_type, rows)), samples[:, :, :3] >> 8)


def test_big_endian_16_bit_tiff_keeps_its_high_byte() -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (4, 5), dtype=np.uint16)
    short, long = 3, 4
    entries = [(256, short, 5), (257, short, 4), (258, short, 16), (259, short, 1), (262, short, 1), (273, long, 8),
               (277, short, 1), (278, short, 4), (279, long, 40)]  # fmt: skip
    directory = b"".join(
        struct.pack(">HHI", tag, kind, 1)
        + (struct.pack(">HH", value, 0) if kind == short else struct.pack(">I", value))
        for tag, kind, value in entries
    )
    data = b"MM\x00*" + struct.pack(">I", 48) + samples.astype(">u2").tobytes()
    data += struct.pack(">H", len(entries)) + directory + bytes(4)
    np.testing.assert_array_equal(decode_image(data), np.stack([samples >> 8] * 3, axis=2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_samples_of_32_bits_are_refused(mode: str) -> None:
    with pytest.raises(InvalidImage, match="32 bits"):
        decode_image(encode(Image.new(mode, (8, 8)), "TIFF"))


def test_cmyk_jpeg_becomes_rgb_as_pillow_does() -> None:
    data = encode(Image.fromarray(picture()).convert("CMYK"), "JPEG")
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_lab_tiff_becomes_rgb() -> None:
    lab = Image.merge("LAB", [Image.new("L", (8, 8), value) for value in (255, 128, 128)])
    assert decode_image(encode(lab, "TIFF")).min() > 200


def test_grey_jpeg_becomes_grey_rgb() -> None:
    decoded = decode_image(encode(Image.fromarray(picture()).convert("L"), "JPEG"))
    assert decoded.shape == (60, 80, 3)
    np.testing.assert_array_equal(decoded[:, :, 0], decoded[:, :, 2])


def test_palette_becomes_its_colours_with_any_transparency() -> None:
    palette = Image.fromarray(picture()).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    for options in ({}, {"transparency": 3}, {"transparency": bytes(range(16))}):
        np.testing.assert_array_equal(decode_image(encode(palette, "PNG", **options)), expected)


def test_one_bit_becomes_black_and_white() -> None:
    bits = np.random.default_rng(0).integers(0, 2, (9, 11)).astype(bool)
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(bits), "PNG")), np.stack([bits * 255] * 3, 2))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    decoded = decode_image(data)
    assert decoded.shape == (6, 8, 3)
    assert np.abs(decoded.astype(int) - [255, 0, 0]).max() < 8


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_truncated_files_are_refused(file_format: str, kept: float) -> None:
    data = encode(picture(120, 160), file_format)
    with pytest.raises(InvalidImage):
        decode_image(data[: int(len(data) * kept)])


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg/>", b"%PDF-1.7", bytes(1000), b"\xff\xd8\xff", b"GIF89a"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidImage):
        decode_image(data)


@pytest.mark.parametrize("file_format", ["ICO", "PPM", "TGA", "JPEG2000", "PDF"])
def test_formats_off_the_list_are_refused(file_format: str) -> None:
    with pytest.raises(InvalidImage, match="send one of JPEG, PNG, WEBP, BMP, TIFF, GIF, AVIF"):
        decode_image(encode(Image.new("RGB", (32, 32)), file_format))


def test_a_header_claiming_900_million_pixels_costs_no_memory() -> None:
    tracemalloc.start()
    with pytest.raises(TooManyPixels):
        decode_image(png(30_000, 30_000, 8, 2, b""))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_the_pixel_budget_holds_exactly(file_format: str) -> None:
    data = encode(picture(60, 80), file_format)
    assert decode_image(data, max_pixels=4800).shape == (60, 80, 3)
    with pytest.raises(TooManyPixels, match=r"80 × 60 = 4,800 pixels; at most 4,799"):
        decode_image(data, max_pixels=4799)


def test_a_jpeg_of_endless_scans_is_refused_unread() -> None:
    data = encode(picture(), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(InvalidImage, match="scans"):
        decode_image(data[:-2] + scan * 1000 + data[-2:])


def test_damaged_files_raise_nothing_else_and_warn_of_nothing() -> None:
    rng = np.random.default_rng(0)
    formats = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"]
    originals = [encode(picture(24, 32), file_format) for file_format in formats]
    originals.append(encode(picture(24, 32), "TIFF", compression="tiff_lzw"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # the filter of model.image, which pytest has replaced
        for attempt in range(1500):
            damaged = bytearray(originals[attempt % len(originals)])
            for _ in range(rng.integers(1, 6)):
                damaged[rng.integers(len(damaged))] = rng.integers(256)
            with contextlib.suppress(InvalidImage):
                decode_image(bytes(damaged), max_pixels=1_000_000)
    assert not caught


def test_decoded_pixels_can_be_written_to() -> None:
    for file_format in ("JPEG", "PNG", "GIF"):
        assert decode_image(encode(picture(), file_format)).flags.writeable


def test_gif_equals_pillows_decoder() -> None:
    data = encode(picture(), "GIF")
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


# The canvas


@pytest.mark.slow
def test_sizes_equal_torchvisions_on_400_sizes() -> None:
    rng = np.random.default_rng(0)
    common = [(480, 640), (640, 480), (427, 640), (1080, 1920), (3000, 4000), (960, 1280), (333, 500), (800, 1333)]
    sizes = common + [tuple(size) for size in rng.integers(16, 2000, (392, 2)).tolist()]
    transform = GeneralizedRCNNTransform(800, 1333, [0.0], [1.0])
    for height, width in sizes:
        # One grey channel of one repeated value: the size is all that is asked, and this takes no memory to read.
        expected, _ = transform.resize(torch.zeros(1, 1, 1).expand(1, height, width), None)
        assert resized_size(height, width, POLICY) == tuple(expected.shape[-2:]), (height, width)


@pytest.mark.parametrize(
    "size", [(480, 640), (640, 427), (375, 500), (801, 1333), (960, 1280), (1200, 1600), (1599, 1201), (1600, 1600)]
)
def test_pixels_are_within_one_grey_level_of_torchvisions(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    canvas = to_canvas(image, POLICY)
    height, width = canvas.size
    expected = torchvision_resize(image, POLICY)
    assert expected.shape == (height, width, 3)
    assert np.abs(canvas.pixels[:height, :width] - expected).max() <= 1


@pytest.mark.parametrize("size", [(45, 60), (76, 114), (77, 113), (99, 131), (151, 213), (401, 403)])
def test_strong_shrinking_keeps_pixel_centres_and_does_not_alias(size: tuple[int, int]) -> None:
    height, width = size
    down, right = np.mgrid[:height, :width]
    checkerboard = (down + right) % 2 * 60
    ramps = (down + 0.5) / height * 250, (right + 0.5) / width * 250
    image = np.stack([*ramps, checkerboard], axis=2).round().astype(np.uint8)
    canvas = to_canvas(image, ResizePolicy(20, 34))
    height, width = canvas.size
    down, right = np.mgrid[:height, :width]
    inner = (slice(1, -1), slice(1, -1))
    valid = canvas.pixels[:height, :width][inner].astype(float)
    # A linear ramp stays the same ramp, but for rounding; here 12 levels are one pixel.
    assert np.abs(valid[:, :, 0] - ((down[inner] + 0.5) / height * 250)).mean() < 1.5
    assert np.abs(valid[:, :, 1] - ((right[inner] + 0.5) / width * 250)).mean() < 1.5
    assert np.abs(valid[:, :, 2] - 30).max() <= 2


@pytest.mark.parametrize("size", [(150, 150), (151, 213), (77, 113)])
def test_strong_shrinking_treats_left_and_right_alike(size: tuple[int, int]) -> None:
    image, policy = picture(*size), ResizePolicy(20, 34, 1)
    turned = to_canvas(image[::-1, ::-1], policy).pixels[::-1, ::-1]
    assert np.abs(turned.astype(int) - to_canvas(image, policy).pixels)[1:-1, 1:-1].mean() < 1.5


def test_the_two_ways_to_resize_meet_at_a_factor_of_two() -> None:
    image = picture(1602, 1602)
    at, below = to_canvas(image[:1600, :1600], POLICY), to_canvas(image, POLICY)
    assert at.size == below.size == (800, 800)
    assert np.abs(at.pixels.astype(int) - below.pixels).mean() < 1


@pytest.mark.parametrize("divisor", [1, 32, 128])
def test_the_canvas_is_padded_with_zeros_to_the_divisor(divisor: int) -> None:
    canvas = to_canvas(np.full((480, 640, 3), 255, np.uint8), ResizePolicy(100, 170, divisor))
    assert canvas.size == (100, 133)
    assert canvas.canvas_size == tuple(-(-side // divisor) * divisor for side in (100, 133))
    assert canvas.pixels[:100, :133].min() == 255
    assert canvas.pixels[100:].sum() == canvas.pixels[:, 133:].sum() == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (32, 4000), (4000, 32), (1, 100_000), (100_000, 3)])
def test_extreme_shapes_have_a_canvas(size: tuple[int, int]) -> None:
    canvas = to_canvas(np.full((*size, 3), 77, np.uint8), POLICY)
    height, width = canvas.size
    assert min(height, width) >= 1 and max(height, width) <= 1333
    assert (canvas.pixels[:height, :width] == 77).all()
    assert all(side % 32 == 0 for side in canvas.canvas_size)


def test_flipped_views_are_resized_like_their_copies() -> None:
    flipped = picture()[:, ::-1]
    np.testing.assert_array_equal(to_canvas(flipped, POLICY).pixels, to_canvas(flipped.copy(), POLICY).pixels)


# Boxes back


def detections(*boxes: tuple[float, float, float, float]) -> Detections:
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), np.ones(len(boxes)), np.ones(len(boxes), np.int64))


def test_boxes_go_back_as_torchvision_sends_them() -> None:
    canvas = to_canvas(picture(427, 640), POLICY)
    boxes = np.random.default_rng(0).uniform(0, 790, (50, 4)).astype(np.float32)
    transform = GeneralizedRCNNTransform(800, 1333, [0.0], [1.0]).eval()
    [expected] = transform.postprocess([{"boxes": torch.from_numpy(boxes)}], [canvas.size], [(427, 640)])
    found = to_original(detections(*boxes), canvas).boxes
    np.testing.assert_allclose(found, expected["boxes"].clamp(min=0), rtol=1e-6)
    assert found.dtype == np.float32


def test_the_whole_canvas_is_the_whole_picture_and_nothing_is_beyond() -> None:
    canvas = CanvasImage(np.zeros((96, 128, 3), np.uint8), size=(75, 100), original_size=(30, 40))
    found = to_original(detections((0, 0, 100, 75), (-5, 10, 128, 96)), canvas).boxes
    np.testing.assert_allclose(found, [[0, 0, 40, 30], [0, 4, 40, 30]])


def test_no_boxes_go_back_as_no_boxes() -> None:
    assert to_original(detections(), to_canvas(picture(), POLICY)).boxes.shape == (0, 4)
