"""Image files in and out: 8-bit RGB arrays, with a clear reason for every file that is refused."""

import io
import os
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from operator import itemgetter
from typing import Any, TypeVar

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps

from infra.errors import DataError, line_of, printable
from infra.files.storage import exists, iter_files, join, read_bytes
from infra.imaging.png import bare_png, chunk

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF")  # Pillow's other readers stay shut: one runs Ghostscript
OBJECT = re.compile(r" ?<[^>]* at 0x[0-9a-f]+>")
SYSTEM_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", ".ds_store"}
MODES = ("RGB", "L", "P", "RGBA", "LA", "1")  # of 8 bits, or fewer, that become RGB without a choice
MAX_PIXELS = 256_000_000
ORIENTATION = 0x0112  # the EXIF tag
_TURNS: dict[int, Any] = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: np.rot90,
}
ItemT = TypeVar("ItemT")
Image.MAX_IMAGE_PIXELS = None  # our own limit below applies before any pixel is decoded


class UnusableImageError(DataError):
    """A file that is not an 8-bit RGB photograph; `reason` is one word to count by."""

    def __init__(self, what: str, *, where: str, todo: str, reason: str = "unusable") -> None:
        super().__init__(what, where=where, todo=todo)
        self.reason = reason


# What is not damaged but of another kind; ImageMagick's commands, for one tool that converts it.
CONVERSIONS = {
    "transparent": "flatten it onto a background: magick IN -background white -alpha remove -alpha off OUT.png",
    "cmyk": "shard it with `cmyk: convert`, or convert it to RGB: magick IN -colorspace sRGB OUT.png",
    "sixteen_bit": "shard it with `sixteen_bit: convert`, or convert it: magick IN -depth 8 OUT.png",
    "heic": "pip install 'ccsr-cluster[heic]' on every node, or convert it: magick IN OUT.png",
    "animated": "take a frame or page of it: magick 'IN[0]' OUT.png",
    "too_large": "cut it into parts: magick IN -crop 8192x8192 OUT_%d.png",
}


def refuse(reason: str, what: str, where: str, *, todo: str | None = None) -> UnusableImageError:
    """The error for a file; `todo`: by default the command that converts it."""
    todo = todo or CONVERSIONS.get(reason, "replace or remove the file")
    return UnusableImageError(what, where=where, todo=todo, reason=reason)


@contextmanager
def refusing(reason: str, what: str, where: str) -> Iterator[None]:
    """Raise whatever a decoder raises in the block as UnusableImageError; memory errors and interrupts pass."""
    try:
        yield
    except (UnusableImageError, MemoryError):
        raise
    except Exception as error:
        detail = OBJECT.sub("", line_of(error))  # a reason is part of a shard's record: the same in each process
        raise refuse(reason, f"{what} ({type(error).__name__}: {detail})", where) from error


@cache
def readable_formats() -> tuple[str, ...]:
    try:
        import pillow_heif
    except ImportError:
        return FORMATS
    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


def decode_image(data: bytes, *, where: str, convert: Collection[str] = ()) -> np.ndarray:
    """Decode an image file to uint8 RGB (H, W, 3), turned upright by its EXIF orientation.

    PNG, JPEG, WebP, BMP, TIFF and AVIF; HEIC with the package pillow-heif. Greyscale is repeated on three channels,
    palettes are resolved, a fully opaque alpha channel is dropped; of a camera's multi-picture JPEG the first picture,
    which is the photograph, is taken. `convert`: with `sixteen_bit` integers of 16 bits a channel are scaled by 1/257
    and rounded, with `cmyk` CMYK becomes sRGB by `to_srgb`.
    Raises UnusableImageError (reason `empty`, `unreadable`, `heic`, `too_large`, `animated`, `sixteen_bit`, `cmyk`,
    `transparent` or `truncated`) for anything else.
    """
    pixels = bare_png(data, MAX_PIXELS)
    if pixels is not None:
        return pixels
    image = open_image(data, where)
    if is_deep(image):
        if "sixteen_bit" not in convert or image.mode.startswith("F"):
            raise refuse("sixteen_bit", f"mode {image.mode} is stored with more than 8 bits a channel", where)
        with refusing("truncated", "the picture data is damaged", where):
            deep = deep_pixels(data, image)
            if deep is None:
                raise ValueError("not of 16-bit integers")
            image = Image.fromarray(to_8_bit(deep))
    if image.mode == "CMYK" and "cmyk" in convert:
        with refusing("truncated", "the picture data or its colour profile is damaged", where):
            image = to_srgb(ImageOps.exif_transpose(image))
    if image.mode not in MODES:
        raise refuse("cmyk", f"colour mode {image.mode} is not RGB", where)
    with refusing("truncated", "the picture data is damaged", where):
        image = ImageOps.exif_transpose(image)
        if image.mode in ("RGBA", "LA") or "transparency" in image.info:
            image = image.convert("RGBA")
            if np.asarray(image)[..., 3].min() < 255:
                raise refuse("transparent", "the picture has transparent pixels", where)
        return np.asarray(image.convert("RGB"))


def open_image(data: bytes, where: str) -> Image.Image:
    """A file's only picture, not decoded yet. UnusableImageError: `empty`, `heic`, `unreadable`, `too_large`,
    `animated`."""
    if not data:
        raise refuse("empty", "the file is empty", where)
    formats = readable_formats()
    if data[4:11] == b"ftyphei" and "HEIF" not in formats:
        raise refuse("heic", "HEIC is read by the package pillow-heif, which is not installed", where)
    with refusing("unreadable", f"the file is not a readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]}", where):
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
        num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if image.width * image.height > MAX_PIXELS:
        raise refuse("too_large", f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels", where)
    if num_frames > 1:
        raise refuse("animated", f"the file holds {num_frames} frames", where)
    return image


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is not decoded yet is stored with more than 8 bits a channel.

    Pillow opens 16-bit colour as RGB and drops the lower byte; only the decoder's raw mode tells.
    """
    return image.mode.startswith(("I", "F")) or ";16" in str(image.tile)  # type: ignore[attr-defined]


def to_srgb(image: Image.Image) -> Image.Image:
    """A CMYK picture in sRGB, by its ICC profile; by Pillow's formula without one."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    new = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    return image.convert("RGB") if new is None else new


def deep_pixels(data: bytes, image: Image.Image) -> np.ndarray | None:
    """uint16 grey (H, W), or (H, W, 2 | 3 | 4) in RGB order, upright, of a file whose `image` is deep; None where that
    is CMYK or not of 16-bit integers. Raises what the decoder raises for damage."""
    image.load()  # raises on damage, which OpenCV fills with grey
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or image.mode == "CMYK":
        return None
    if pixels.ndim == 3 and pixels.shape[2] >= 3:
        pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    turned = {} if image.format == "TIFF" else _TURNS  # OpenCV turns a TIFF, as Pillow does
    turn = turned.get(image.getexif().get(ORIENTATION, 1))
    return pixels if turn is None else turn(pixels)


def to_8_bit(image: np.ndarray) -> np.ndarray:
    """uint8 of uint8 or uint16."""
    return image if image.dtype == np.uint8 else ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def read_image(uri: str) -> np.ndarray:
    """Read and decode one file; see `decode_image`."""
    return decode_image(read_bytes(uri), where=uri)


def encode_png(image: np.ndarray, profile: bytes | None = None, exif: bytes | None = None) -> bytes:
    """Encode uint8 or uint16 RGB(A) (H, W, 3 | 4) or grey (H, W), with an ICC profile and EXIF (as in a JPEG); the same
    input gives the same bytes."""
    pixels = image[..., [2, 1, 0, 3][: image.shape[2]]] if image.ndim == 3 else image
    # On photographs, files and time are smaller than at any zlib level of their quality (benchmarks/png.md).
    flags = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    done, data = cv2.imencode(".png", pixels, flags)
    if not done:
        raise DataError(
            f"an array of {image.dtype} {image.shape} cannot be written as PNG",
            where="encode_png",
            todo="give uint8 or uint16 of shape (H, W), (H, W, 3) or (H, W, 4)",
        )
    png = data.tobytes()
    chunks = b""
    if profile is not None:
        chunks += chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(profile))
    if exif is not None:
        chunks += chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    end_of_header = 8 + 4 + 4 + 13 + 4  # signature, then the first chunk: length, name, content, checksum
    return png[:end_of_header] + chunks + png[end_of_header:]


def is_plain_jpeg(data: bytes) -> bool:
    """Whether a file that decodes is a colour JPEG that any reader shows as `decode_image` does, but for rounding in
    the decoder: not turned by EXIF, one picture, nothing behind its end."""
    if data[:3] != b"\xff\xd8\xff" or data[-2:] != b"\xff\xd9":
        return False
    image = Image.open(io.BytesIO(data), formats=["JPEG"])
    return image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(ORIENTATION, 1) == 1


def skip_system_files(
    items: Iterable[ItemT], where: str, *, hidden: bool = False, name: Callable[[ItemT], str] = str
) -> Iterator[ItemT]:
    """Items whose `name` is a path below `where`, without what operating systems leave there (.DS_Store, ._NAME,
    Thumbs.db, __MACOSX/ and the like), where `hidden` also without hidden files and folders; at the end a note gives
    the number of those left out."""

    marks = "." if hidden else "._"

    def skipped(part: str) -> bool:
        return part.lower() in SYSTEM_NAMES or (part.startswith(marks) and part not in (".", ".."))

    first, count, folder, skip_folder = "", 0, "", False
    for item in items:
        above, _, base = name(item).rpartition("/")
        if above != folder:  # files of one folder come in a row
            folder, skip_folder = above, any(map(skipped, above.split("/")))
        if skip_folder or skipped(base):
            first, count = first or name(item), count + 1
        else:
            yield item
    if count:
        kinds = "hidden or system files" if hidden else "system files"
        print(f"note: {count} {kinds} left out, for one {printable(first)}: {where}", file=sys.stderr)


def list_images(folder: str) -> dict[str, int]:
    """URI -> size in bytes of all image files below a folder or s3:// prefix, sorted. DataError if there are none."""
    check_folder(folder)
    files = dict(iter_files(folder))
    found = {join(folder, name): size for name, size in choose_images(files.items(), folder)}
    if not found:
        raise no_images(folder, there=bool(files))
    return found


def check_folder(folder: str) -> None:
    """DataError where this is a file."""
    if exists(folder):
        raise DataError("this is a file; a folder is expected", where=folder, todo="check the path")


def no_images(folder: str, *, there: bool) -> DataError:
    """The error of a folder without images; `there`: with other files."""
    what = (
        f"no images ({', '.join(IMAGE_SUFFIXES)}) here"
        if there or os.path.isdir(folder)
        else "no images: this file or folder does not exist"
    )
    return DataError(what, where=folder, todo="check the path")


def choose_images(files: Iterable[tuple[str, int]], where: str) -> Iterator[tuple[str, int]]:
    """The image files among (path below `where`, size), without hidden and system files."""
    for name, size in skip_system_files(files, where, hidden=True, name=itemgetter(0)):
        if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
            yield name, size


def below(uri: str, folder: str) -> str:
    """The path of a file below a folder that `list_images` gave it for."""
    return uri.removeprefix(join(folder, ""))
