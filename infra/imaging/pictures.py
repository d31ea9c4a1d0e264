"""Pictures as people keep them: alpha, grey, 16 bits, EXIF and ICC profile, into PNG, JPEG, WebP and TIFF."""

import io
import math
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from infra.imaging.images import (
    MODES,
    deep_pixels,
    encode_png,
    is_deep,
    open_image,
    refuse,
    refusing,
    to_8_bit,
    to_srgb,
)

PictureFormat = Literal["png", "jpg", "webp", "tiff"]
FORMATS_OF: dict[str, PictureFormat] = {
    ".png": "png",
    ".jpg": "jpg",
    ".jpeg": "jpg",
    ".webp": "webp",
    ".tif": "tiff",
    ".tiff": "tiff",
}
"""The format of an output by its suffix."""
MAX_SIDE = {"jpg": 65_500, "webp": 16_383}
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_BASE = ExifTags.Base
_KEPT_TAGS = (
    *(_BASE.ImageDescription, _BASE.Make, _BASE.Model, _BASE.XResolution, _BASE.YResolution, _BASE.ResolutionUnit),
    *(_BASE.Software, _BASE.DateTime, _BASE.Artist, _BASE.Copyright),
)
_OLD_SIZE = (_BASE.ExifImageWidth, _BASE.ExifImageHeight, _BASE.ExifInteroperabilityOffset)


@dataclass(frozen=True)
class Picture:
    """`rgb`: uint8 or uint16 (H, W, 3), upright, in the colours of `profile` (None: sRGB, or not said); `alpha`: (H, W)
    of the same dtype, None where all is opaque; `exif`: as in a JPEG. `single`: the file has one channel of colours."""

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    profile: bytes | None = None
    exif: bytes | None = None
    single: bool = False


def decode_picture(
    data: bytes, *, where: str, form: PictureFormat, convert: bool = False, gps: bool = False
) -> Picture:
    """The picture in a PNG, JPEG, WebP, BMP or TIFF, to be written as `form`.

    EXIF keeps camera, date, author and exposure; of `gps` the position. Orientation is applied, thumbnails, old sizes
    and XMP are dropped. `convert`: CMYK becomes sRGB by its profile (Pillow's formula without one), and what `form`
    cannot hold is given up: alpha is put on white, 16 bits are rounded to 8. UnusableImageError (reasons of
    `decode_image`) for these without `convert`, and for what no format here holds.
    """
    image = open_image(data, where)
    deep, profile, exif = is_deep(image), image.info.get("icc_profile"), _kept_exif(image, gps=gps)
    if image.mode == "CMYK" and not deep and not convert:
        raise refuse("cmyk", "the picture is CMYK", where, todo="add --convert, which brings it to sRGB")
    if image.mode not in (*MODES, "CMYK") and not deep:
        raise refuse("cmyk", f"colour mode {image.mode} is not RGB", where)
    with refusing("truncated", "the picture data is damaged", where):
        if deep:
            found = deep_pixels(data, image)
            if found is None:
                raise refuse("sixteen_bit", "of deep pictures only grey and RGB with 16-bit integers are taken", where)
            pixels = found
        else:
            image = ImageOps.exif_transpose(image)
            if image.mode == "CMYK":
                image, profile = to_srgb(image), None
            transparent = image.mode in ("RGBA", "LA") or "transparency" in image.info
            single = image.mode in ("L", "LA", "1")
            pixels = np.asarray(image.convert("RGBA" if transparent else "L" if single else "RGB"))
            pixels = pixels[..., [0, 3]] if transparent and single else pixels
    single = pixels.ndim == 2 or pixels.shape[2] == 2
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    alpha = pixels[..., -1] if pixels.shape[2] in (2, 4) else None
    rgb = np.ascontiguousarray(np.broadcast_to(pixels[..., :1], (*pixels.shape[:2], 3)) if single else pixels[..., :3])
    if alpha is not None and alpha.min() == np.iinfo(alpha.dtype).max:
        alpha = None
    colours = b"GRAY" if single and alpha is None else b"RGB "
    profile = profile if isinstance(profile, bytes) and profile[16:20] == colours else None
    return _fitted(Picture(rgb, alpha, profile, exif, single), form, convert, where)


def _fitted(picture: Picture, form: PictureFormat, convert: bool, where: str) -> Picture:
    """What `form` can hold of a picture."""
    if picture.alpha is not None and form == "jpg":
        if not convert:
            todo = "use --format png, webp or tiff, or add --convert, which puts it on white"
            raise refuse("transparent", "the picture has transparent pixels, which JPEG cannot hold", where, todo=todo)
        top = np.iinfo(picture.rgb.dtype).max
        opacity = picture.alpha[..., None] / top
        on_white = np.rint(picture.rgb * opacity + top * (1 - opacity)).astype(picture.rgb.dtype)
        picture = replace(picture, rgb=on_white, alpha=None)
    if picture.rgb.dtype == np.uint16 and form in ("jpg", "webp"):
        if not convert:
            todo = "use --format png or tiff, or add --convert, which rounds them to 8"
            raise refuse("sixteen_bit", f"{form} cannot hold 16 bits a channel", where, todo=todo)
        alpha = None if picture.alpha is None else to_8_bit(picture.alpha)
        picture = replace(picture, rgb=to_8_bit(picture.rgb), alpha=alpha)
    return picture


def enlarged_size(sides: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) of an image's output, rounded up."""
    height, width = (math.ceil(round(side * scale, 6)) for side in sides)
    return height, width


def resized(
    image: np.ndarray, size: tuple[int, int], resampling: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """PIL's interpolation of uint8 or uint16, (H, W) or (H, W, 3), to `size` = (H, W), antialiased when shrinking (its
    bicubic has a = -0.5); the same dtype."""
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(image).resize(size[::-1], resampling))
    planes = [image] if image.ndim == 2 else [image[..., channel] for channel in range(image.shape[2])]
    new = [np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size[::-1], resampling)) for plane in planes]
    levels = np.rint(np.clip(new, 0, 65_535)).astype(np.uint16)
    return levels[0] if image.ndim == 2 else np.ascontiguousarray(np.moveaxis(levels, 0, -1))


def to_grey(image: np.ndarray) -> np.ndarray:
    """The luma (BT.601) of RGB (H, W, 3), uint8 or uint16, rounded, on three channels; the same dtype."""
    return np.rint(image @ LUMA).astype(image.dtype)[..., None].repeat(3, axis=2)


def encode_picture(
    restored: np.ndarray, source: Picture, form: PictureFormat, quality: int, *, side_by_side: bool = False
) -> bytes:
    """`restored`, (H, W, 3) of the dtype of `source.rgb`, as a file with what `source` has beside its colours.

    Alpha is enlarged by bicubic interpolation; of a source with one channel one is written.
    `side_by_side`: the source, enlarged so, to the left of the result.
    """
    size = restored.shape[:2]
    alpha = None if source.alpha is None else resized(source.alpha, size)
    if side_by_side:
        restored = np.concatenate([resized(source.rgb, size), restored], axis=1)
        alpha = None if alpha is None else np.concatenate([alpha, alpha], axis=1)
    if alpha is not None:
        pixels = np.dstack([restored, alpha])
    else:
        pixels = np.ascontiguousarray(restored[..., 0]) if source.single and form != "webp" else restored
    profile = None if source.profile and pixels.ndim == 3 and source.profile[16:20] == b"GRAY" else source.profile
    if form == "png":
        return encode_png(pixels, profile, source.exif)
    if form == "tiff":
        return _tiff(pixels, profile, source.exif)
    kind: dict[str, Any] = {"format": "WEBP"} if form == "webp" else {"format": "JPEG", "subsampling": 0}
    beside: dict[str, Any] = {name: value for name, value in (("icc_profile", profile), ("exif", source.exif)) if value}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, quality=quality, **kind, **beside)
    return file.getvalue()


def _kept_exif(image: Image.Image, *, gps: bool) -> bytes | None:
    """EXIF as a JPEG holds it; None where nothing is left. A block that cannot be read is dropped."""
    try:
        old, new = image.getexif(), Image.Exif()
        for tag in _KEPT_TAGS:
            if tag in old:
                new[tag] = old[tag]
        details = {tag: value for tag, value in old.get_ifd(ExifTags.IFD.Exif).items() if tag not in _OLD_SIZE}
        for ifd, values in ((ExifTags.IFD.Exif, details), (ExifTags.IFD.GPSInfo, old.get_ifd(ExifTags.IFD.GPSInfo))):
            if values and (gps or ifd != ExifTags.IFD.GPSInfo):
                new[ifd] = dict(values)
        return new.tobytes() if len(new) else None
    except (ValueError, TypeError, KeyError, SyntaxError, OSError, struct.error):
        return None


def _tiff(pixels: np.ndarray, profile: bytes | None, exif: bytes | None) -> bytes:
    """A TIFF of one deflated strip: uint8 or uint16, (H, W) or (H, W, 3 | 4). Neither Pillow nor OpenCV writes 16-bit
    colours together with a profile and EXIF."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    strip = zlib.compress(pixels.astype(pixels.dtype.newbyteorder("<")).tobytes(), 6)
    tags = ImageFileDirectory_v2(prefix=b"II")
    if exif:
        found = Image.Exif()
        found.load(exif)
        for tag in found:
            tags[tag] = found.get_ifd(tag) if tag in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo) else found[tag]
    tags[_BASE.ImageWidth], tags[_BASE.ImageLength] = pixels.shape[1], pixels.shape[0]
    tags[_BASE.BitsPerSample] = (8 * pixels.dtype.itemsize,) * channels
    tags[_BASE.Compression] = 8  # deflate
    tags[_BASE.PhotometricInterpretation] = 1 if channels == 1 else 2  # black is 0; RGB
    tags[_BASE.SamplesPerPixel], tags[_BASE.RowsPerStrip] = channels, pixels.shape[0]
    tags[_BASE.StripByteCounts] = len(strip)
    if channels == 4:
        tags[338] = 2  # ExtraSamples: alpha, not premultiplied
    if profile:
        tags[_BASE.InterColorProfile] = profile
    tags[_BASE.StripOffsets] = 0  # Pillow adds where the directory ends
    return b"II*\0" + struct.pack("<I", 8) + tags.tobytes(8) + strip
