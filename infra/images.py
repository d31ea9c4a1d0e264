"""Image files in and out: 8-bit RGB arrays, with a clear reason for every file that is refused."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from infra.errors import DataError
from infra.storage import list_files, read_bytes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # Pillow's other readers stay shut: one runs Ghostscript
# What Pillow's readers raise on damaged files, found by flipping bytes of each format.
_DAMAGE = (OSError, ValueError, SyntaxError, TypeError, EOFError, struct.error)
MAX_PIXELS = 256_000_000
Image.MAX_IMAGE_PIXELS = None  # our own limit below applies before any pixel is decoded


class UnusableImageError(DataError):
    """A file that is not an 8-bit RGB photograph; `reason` is one word to count by."""

    def __init__(self, what: str, *, where: str, todo: str, reason: str = "unusable") -> None:
        super().__init__(what, where=where, todo=todo)
        self.reason = reason


def _refuse(reason: str, what: str, where: str) -> UnusableImageError:
    return UnusableImageError(what, where=where, todo="replace, convert or remove the file", reason=reason)


def decode_image(data: bytes, *, where: str) -> np.ndarray:
    """Decode an image file to uint8 RGB (H, W, 3), turned upright by its EXIF orientation.

    PNG, JPEG, WebP, BMP and TIFF. Greyscale is repeated on three channels, palettes are resolved, a fully opaque alpha
    channel is dropped; of a camera's multi-picture JPEG the first picture, which is the photograph, is taken.
    Raises UnusableImageError (reason `empty`, `unreadable`, `too_large`, `animated`, `sixteen_bit`, `cmyk`,
    `transparent` or `truncated`) for anything else.
    """
    if not data:
        raise _refuse("empty", "the file is empty", where)
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except _DAMAGE as error:
        what = f"the file is not an image that can be read ({', '.join(FORMATS)})"
        raise _refuse("unreadable", what, where) from error
    if image.width * image.height > MAX_PIXELS:
        raise _refuse("too_large", f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels", where)
    if num_frames > 1:
        raise _refuse("animated", f"the file holds {num_frames} frames", where)
    # Pillow opens 16-bit colour as RGB and drops the lower byte; only the decoder's raw mode tells.
    if image.mode.startswith(("I", "F")) or ";16" in str(image.tile):  # type: ignore[attr-defined]
        raise _refuse("sixteen_bit", f"mode {image.mode} is stored with more than 8 bits a channel", where)
    if image.mode not in ("RGB", "L", "P", "RGBA", "LA", "1"):
        raise _refuse("cmyk", f"colour mode {image.mode} is not RGB", where)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA") or "transparency" in image.info:
            image = image.convert("RGBA")
            if np.asarray(image)[..., 3].min() < 255:
                raise _refuse("transparent", "the picture has transparent pixels", where)
        return np.asarray(image.convert("RGB"))
    except _DAMAGE as error:
        raise _refuse("truncated", f"the picture data is damaged ({error})", where) from error


def read_image(uri: str) -> np.ndarray:
    """Read and decode one file; see `decode_image`."""
    return decode_image(read_bytes(uri), where=uri)


def icc_profile(data: bytes) -> bytes | None:
    """The RGB colour profile that an image file carries; None where it has none, or one of other colours.

    `data`: a file that `decode_image` takes; that function's pixels stay in the profile's colours.
    """
    profile = Image.open(io.BytesIO(data), formats=FORMATS).info.get("icc_profile")
    return profile if profile and profile[16:20] == b"RGB " else None


def encode_png(image: np.ndarray, profile: bytes | None = None) -> bytes:
    """Encode uint8 RGB (H, W, 3) or uint16 grey (H, W), with an ICC profile; the same input gives the same bytes."""
    pixels = image[..., ::-1] if image.ndim == 3 else image
    # On photographs, files and time are smaller than at any zlib level of their quality (benchmarks/png.md).
    flags = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    done, data = cv2.imencode(".png", pixels, flags)
    if not done:
        raise DataError(
            f"an array of shape {image.shape} cannot be written as PNG", where="encode_png", todo="check the image"
        )
    png = data.tobytes()
    if profile is None:
        return png
    chunk = b"iCCPICC profile\0\0" + zlib.compress(profile)
    end_of_header = 8 + 4 + 4 + 13 + 4  # signature, then the first chunk: length, name, content, checksum
    length, checksum = struct.pack(">I", len(chunk) - 4), struct.pack(">I", zlib.crc32(chunk))
    return png[:end_of_header] + length + chunk + checksum + png[end_of_header:]


def is_plain_png(data: bytes) -> bool:
    """Whether a file that decodes is an 8-bit RGB PNG that any reader shows as `decode_image` does: not turned by EXIF,
    not animated, nothing behind its end."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[24:26] != b"\x08\x02":  # bits a channel, colour type
        return False
    at, kind = 8, b""
    while at + 12 <= len(data) and kind != b"IEND":
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        hidden = kind in (b"tEXt", b"zTXt", b"iTXt") and b"exif" in data[at + 8 : at + 8 + 64].lower()
        if kind in (b"eXIf", b"tRNS", b"acTL") or hidden:
            return False
        at += 12 + size
    return kind == b"IEND" and at == len(data)


def gradient_energy(image: np.ndarray) -> float:
    """Mean squared difference of neighbouring pixels, across plus down, of uint8 RGB (H, W, 3) as grey levels.

    Below about 4 a picture is flat (sky, wall); most photographs have 50 to 2000.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return float(sum(np.mean(np.square(np.diff(grey, axis=axis)), dtype=np.float64) for axis in (0, 1)))


def list_images(folder: str) -> dict[str, int]:
    """URI -> size in bytes of all image files below a folder or s3:// prefix, sorted. DataError if there are none."""
    found = {uri: size for uri, size in list_files(folder).items() if Path(uri).suffix.lower() in IMAGE_SUFFIXES}
    if not found:
        raise DataError(
            f"no images ({', '.join(IMAGE_SUFFIXES)}) here", where=folder, todo="check the path of the image folder"
        )
    return found


def resize_bicubic(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """PIL's bicubic (a = -0.5, antialiased when shrinking), uint8 RGB in and out."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
