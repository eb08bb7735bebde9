"""Names of file formats by their first bytes, for errors and to tell pictures from other files."""

from collections.abc import Callable

READ = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
"""Formats that are read, by Pillow's names."""
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".webp", ".bmp",
    ".dib", ".tif", ".tiff", ".btf", ".tf8", ".gif", ".avif", ".avifs",
)  # fmt: skip
"""File name endings of these formats."""
HEAD_BYTES = 512
"""First bytes of a file that suffice to name any format."""

_BRANDS = {  # of the ISO base media format: what stands behind "ftyp"
    "AVIF": (b"avif", b"avis"),
    "HEIC": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"heif"),
    "a Canon raw file (CR3)": (b"crx ",),
    "JPEG XL": (b"jxl ",),
    "JPEG 2000": (b"jp2 ", b"jpx ", b"jpm "),
}
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff\xf7", "JPEG-LS"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"8BPS", "Photoshop (PSD)"),
    (b"IIRO", "an Olympus raw file (ORF)"),
    (b"IIRS", "an Olympus raw file (ORF)"),
    (b"MMOR", "an Olympus raw file (ORF)"),
    (b"IIU\0", "a Panasonic raw file (RW2)"),
    (b"FUJIFILMCCD-RAW", "a Fujifilm raw file (RAF)"),
    (b"FOVb", "a Sigma raw file (X3F)"),
    (b"\0MRM", "a Minolta raw file (MRW)"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"DDS ", "DirectDraw (DDS)"),
    (b"qoif", "QOI"),
    (b"SIMPLE  =", "FITS"),
    (b"gimp xcf", "GIMP (XCF)"),
    (b"%PDF-", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM film"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for (`git lfs pull` fetches that)"),
    (b"PK\5\6", "an empty ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x89HDF\r\n\x1a\n", "HDF5 (Keras, h5py)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "GGUF"),
    (b"ORTM", "ONNX Runtime's own format (ORT)"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a Windows program"),
    (b"\x80\2\x8a\nl\xfc\x9cF\xf9", "a PyTorch checkpoint (in the format before 1.6)"),
)
_TEXTS: tuple[tuple[bytes, str], ...] = (
    (b"<svg", "SVG"),
    (b"<!doctype svg", "SVG"),
    (b"<!doctype html", "a web page (HTML)"),
    (b"<html", "a web page (HTML)"),
    (b"<head", "a web page (HTML)"),
    (b"<body", "a web page (HTML)"),
    (b"data:", "a data URL: send the bytes themselves"),
    (b"/9j/", "a JPEG in base64: send the bytes themselves"),
    (b"ivborw0kggo", "a PNG in base64: send the bytes themselves"),
    (b"{", "JSON"),
    (b"[", "JSON"),
)


def name_of(data: bytes) -> str | None:
    """Return the format, one of READ or in words; None: it is unknown. The first HEAD_BYTES suffice."""
    head = bytes(data[:HEAD_BYTES])
    for test in (_by_beginning, _by_container, _by_text):
        if name := test(head):
            return name
    return None


def _by_beginning(head: bytes) -> str | None:
    return next((name for beginning, name in _BEGINNINGS if head.startswith(beginning)), None)


def _by_container(head: bytes) -> str | None:
    """Name a format whose mark is not at the beginning, or that holds other formats."""
    tests: tuple[tuple[bool, Callable[[bytes], str | None]], ...] = (
        (head[:2] == b"BM" and head[14:18].strip(b"\0") != b"" and not any(head[15:18]), lambda _: "BMP"),
        (head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _tiff),
        (head[:4] == b"RIFF", lambda _: "WEBP" if head[8:12] == b"WEBP" else "RIFF (WAV or AVI)"),
        (head[4:8] == b"ftyp", _iso_media),
        (head[:4] == b"PK\3\4", _zip),
        (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"), lambda _: "a Python pickle"),
        (head[8:10] == b'{"' and not any(head[6:8]), lambda _: "safetensors"),
        (head[4:8] == b"TFL3", lambda _: "TensorFlow Lite"),
        (head[128:132] == b"DICM", lambda _: "DICOM"),
        (head[257:262] == b"ustar", lambda _: "a tar archive"),
        (head[:1] == b"P" and head[1:2] in b"1234567" and head[2:3].isspace(), lambda _: "Netpbm (PPM, PGM, PBM)"),
    )
    return next((name(head) for holds, name in tests if holds), None)


def _tiff(head: bytes) -> str:
    """Name a TIFF; some raw files are TIFFs, and name themselves first."""
    raw = {b"CR": "a Canon raw file (CR2)", b"II": "a Phase One raw file (IIQ)", b"MM": "a Phase One raw file (IIQ)"}
    return raw.get(head[8:10], "TIFF")


def _iso_media(head: bytes) -> str:
    """Name it by its major brand, else by a compatible brand: AVIF may have the major brand mif1."""
    box = head[8 : int.from_bytes(head[:4], "big")]
    brands = [box[start : start + 4] for start in (0, *range(8, len(box), 4))]
    if brands[0] in (b"mif1", b"msf1") and not set(_BRANDS["AVIF"]).isdisjoint(brands):
        return "AVIF"
    for brand in brands:
        for name, own in _BRANDS.items():
            if brand in own:
                return name
    return "a film (MP4 or QuickTime)"


def _zip(head: bytes) -> str:
    name = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if name.endswith((b"/data.pkl", b"/byteorder", b"/version")):
        return "a PyTorch checkpoint"
    return "a NumPy archive (npz)" if name.endswith(b".npy") else "a ZIP archive"


def _by_text(head: bytes) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<?xml", b"<!--")):
        return "SVG" if b"<svg" in text else "XML"
    return next((name for beginning, name in _TEXTS if text.startswith(beginning)), None)
