"""PNG files by their chunks: whether there is more than pixels in one; one with nothing else is decoded at once."""

import struct
import zlib
from collections.abc import Iterator

import cv2
import numpy as np

PNG, RGB_8_BIT = b"\x89PNG\r\n\x1a\n", b"\x08\x02"  # how a PNG begins; its bits a channel and colour type


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bare_png(data: bytes, max_pixels: int) -> np.ndarray | None:
    """The pixels of an 8-bit RGB PNG of at most `max_pixels` with nothing else in it, as `encode_png` writes it: OpenCV
    decodes it in two thirds of Pillow's time (benchmarks/png.md). None: another file, or Pillow says what is wrong."""
    if data[:8] != PNG or data[24:26] != RGB_8_BIT:
        return None
    width, height = struct.unpack(">II", data[16:24])
    kinds = [kind for kind, *_ in _chunks(data)]
    if width * height > max_pixels or kinds[-1] != b"IEND" or not {*kinds} <= {b"IHDR", b"IDAT", b"IEND"}:
        return None
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # out of memory too
        return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, begin and end of a PNG's chunks."""
    at, kind = 8, b""
    while at + 12 <= len(data) and kind != b"IEND":
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        yield kind, at, at + 12 + size
        at += 12 + size


def is_plain_png(data: bytes) -> bool:
    """Whether a file that decodes is an 8-bit RGB PNG that any reader shows as `decode_image` does: not turned by EXIF,
    not animated, nothing behind its end."""
    if data[:8] != PNG or data[24:26] != RGB_8_BIT:
        return False
    chunks = list(_chunks(data))
    for kind, at, _ in chunks:
        hidden = kind in (b"tEXt", b"zTXt", b"iTXt") and b"exif" in data[at + 8 : at + 8 + 64].lower()
        if kind in (b"eXIf", b"tRNS", b"acTL") or hidden:
            return False
    return bool(chunks) and chunks[-1][0] == b"IEND" and chunks[-1][2] == len(data)
