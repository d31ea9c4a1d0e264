"""Image files: photographs come out as upright 8-bit RGB, everything else with the reason why it does not."""

import io
import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pillow_heif
import pytest
from PIL import Image

from infra import DataError, rng_for
from infra.files.publish import write_bytes
from infra.imaging.images import (
    FORMATS,
    UnusableImageError,
    decode_image,
    encode_png,
    is_plain_jpeg,
    list_images,
    read_image,
)
from infra.imaging.pictures import decode_picture, resized
from infra.imaging.png import is_plain_png


def photo(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """uint8 (H, W, 3): smooth colour with a little noise."""
    y, x = np.mgrid[:height, :width]
    base = np.stack([4 * y % 256, 3 * x % 256, (x + 2 * y) % 256], axis=-1)
    return np.clip(base + rng_for(seed, "photo").integers(-8, 9, base.shape), 0, 255).astype(np.uint8)


PHOTO = photo()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(PHOTO).convert(mode)


def with_alpha(alpha: int, mode: str = "RGBA") -> Image.Image:
    image = picture(mode)
    image.putalpha(Image.new("L", image.size, 255))
    image.putpixel((3, 4), (*image.getpixel((3, 4))[:-1], alpha))  # type: ignore[index, misc]
    return image


def palette(**options: Any) -> bytes:
    return saved(picture().quantize(16), "PNG", **options)


SIXTEEN_RGB = PHOTO.astype(np.uint16) * 257


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "empty", id="zero bytes"),
        pytest.param(b"This is no photograph.", "unreadable", id="text"),
        pytest.param(b"\x89PNG\r\n\x1a\n", "unreadable", id="a PNG's first bytes"),
        pytest.param(saved(picture(), "GIF"), "unreadable", id="GIF"),
        pytest.param(saved(picture(), "EPS"), "unreadable", id="EPS"),
        pytest.param(saved(picture(), "PNG")[:-200], "truncated", id="cut PNG"),
        pytest.param(saved(picture(), "JPEG")[:-200], "truncated", id="cut JPEG"),
        pytest.param(saved(picture(), "WEBP", lossless=True)[:-200], "unreadable", id="cut WebP"),
        pytest.param(saved(picture(), "BMP")[:-200], "truncated", id="cut BMP"),
        pytest.param(saved(picture("CMYK"), "JPEG"), "cmyk", id="CMYK JPEG"),
        pytest.param(saved(picture("CMYK"), "TIFF"), "cmyk", id="CMYK TIFF"),
        pytest.param(saved(picture("LAB"), "TIFF"), "cmyk", id="LAB TIFF"),
        pytest.param(saved(Image.fromarray(SIXTEEN_RGB[..., 0]), "PNG"), "sixteen_bit", id="16-bit grey PNG"),
        pytest.param(cv2.imencode(".png", SIXTEEN_RGB)[1].tobytes(), "sixteen_bit", id="16-bit colour PNG"),
        pytest.param(cv2.imencode(".tiff", SIXTEEN_RGB)[1].tobytes(), "sixteen_bit", id="16-bit colour TIFF"),
        pytest.param(saved(picture("F"), "TIFF"), "sixteen_bit", id="float TIFF"),
        pytest.param(saved(picture(), "PNG", save_all=True, append_images=[picture()]), "animated", id="APNG"),
        pytest.param(
            saved(picture(), "WEBP", save_all=True, append_images=[picture("L")]), "animated", id="moving WebP"
        ),
        pytest.param(saved(picture(), "TIFF", save_all=True, append_images=[picture()]), "animated", id="2-page TIFF"),
        pytest.param(saved(with_alpha(254), "PNG"), "transparent", id="RGBA"),
        pytest.param(saved(with_alpha(0, "L"), "PNG"), "transparent", id="grey and alpha"),
        pytest.param(palette(transparency=0), "transparent", id="transparent palette"),
    ],
)
def test_what_is_no_photograph_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnusableImageError) as caught:
        decode_image(data, where="set/x.png")
    assert caught.value.reason == reason
    assert caught.value.where == "set/x.png"
    assert "0x" not in caught.value.what, "a reason is the same in each process"
    assert str(caught.value).count("\n") == 2


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    bomb = saved(Image.new("1", (17_000, 16_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(UnusableImageError) as caught:
        decode_image(bomb, where="x")
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_files_come_out_exactly(kind: str) -> None:
    image = decode_image(saved(picture(), kind), where="x")
    assert image.dtype == np.uint8
    assert (image == PHOTO).all()


def test_grey_opaque_and_palette_pictures_become_rgb() -> None:
    grey = decode_image(saved(picture("L"), "PNG"), where="x")
    assert (grey == np.asarray(picture("L"))[..., None]).all()
    assert grey.shape == PHOTO.shape
    assert (decode_image(saved(with_alpha(255), "PNG"), where="x") == PHOTO).all()
    assert (decode_image(palette(), where="x") == np.asarray(picture().quantize(16).convert("RGB"))).all()
    bits = decode_image(saved(picture("1"), "PNG"), where="x")
    assert set(np.unique(bits)) == {0, 255}


def test_a_palette_whose_transparent_colour_is_not_used_is_opaque() -> None:
    image = picture().quantize(16)
    assert decode_image(saved(image, "PNG", transparency=200), where="x").shape == PHOTO.shape


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a.transpose(1, 0, 2)[::-1, ::-1]),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(orientation: int, upright: Callable[[np.ndarray], np.ndarray]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (decode_image(saved(picture(), "PNG", exif=exif), where="x") == upright(PHOTO)).all()


def test_avif_and_heic_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    avif, heic = saved(picture(), "AVIF", quality=95), io.BytesIO()
    pillow_heif.from_pillow(picture()).save(heic, quality=95)
    for data in (avif, heic.getvalue()):
        assert np.abs(decode_image(data, where="x").astype(int) - PHOTO).mean() < 6
    monkeypatch.setattr("infra.imaging.images.readable_formats", lambda: FORMATS)
    with pytest.raises(UnusableImageError, match="pillow-heif") as caught:
        decode_image(heic.getvalue(), where="x")
    assert caught.value.reason == "heic"


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_are_converted_on_request(suffix: str) -> None:
    for pixels in (np.maximum(SIXTEEN_RGB, 100) - np.uint16(100), SIXTEEN_RGB[..., 0]):
        data = cv2.imencode(suffix, pixels)[1].tobytes()
        expected = np.rint(pixels / 257).astype(np.uint8)
        expected = expected[..., ::-1] if pixels.ndim == 3 else np.stack([expected] * 3, -1)
        assert np.array_equal(decode_image(data, where="x", convert=["sixteen_bit"]), expected)
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = Image.fromarray(SIXTEEN_RGB[..., 0])
    upright = decode_image(saved(grey, "PNG", exif=turned), where="x", convert=["sixteen_bit"])
    assert upright.shape[:2] == SIXTEEN_RGB.shape[1::-1]
    clear = np.dstack([SIXTEEN_RGB, np.zeros(SIXTEEN_RGB.shape[:2], np.uint16)])
    for data, reason in (
        (saved(picture("F"), "TIFF"), "sixteen_bit"),
        (cv2.imencode(".png", clear)[1].tobytes(), "transparent"),
        (cv2.imencode(".png", SIXTEEN_RGB)[1].tobytes()[:-60], "truncated"),
    ):
        with pytest.raises(UnusableImageError) as caught:
            decode_image(data, where="x", convert=["sixteen_bit"])
        assert caught.value.reason == reason


def test_of_a_cameras_multi_picture_jpeg_the_photograph_is_taken() -> None:
    preview = picture().resize((8, 8))
    data = saved(picture(), "MPO", save_all=True, append_images=[preview], quality=95)
    image = decode_image(data, where="x")
    assert image.shape == PHOTO.shape
    assert np.abs(image.astype(int) - PHOTO).mean() < 10


FILES = [
    saved(picture(), "PNG"),
    saved(picture(), "JPEG", progressive=True),
    saved(picture(), "WEBP"),
    saved(picture(), "BMP"),
    saved(picture(), "TIFF", compression="tiff_lzw"),
    saved(picture(), "TIFF", save_all=True, append_images=[picture()]),
    palette(transparency=3),
]


def tags(tiff: bytes) -> list[int]:
    """The places of all 12-byte tags in a little-endian TIFF."""
    places, at = [], int.from_bytes(tiff[4:8], "little")
    while at:
        count = int.from_bytes(tiff[at : at + 2], "little")
        places += range(at + 2, at + 2 + 12 * count, 12)
        at = int.from_bytes(tiff[at + 2 + 12 * count :][:4], "little")
    return places


def compressed_as(tiff: bytes, kind: int, frame: int) -> bytes:
    """`tiff` with another compression (tag 259) in one of its frames."""
    place = [at for at in tags(tiff) if tiff[at : at + 2] == (259).to_bytes(2, "little")][frame]
    return tiff[: place + 8] + kind.to_bytes(2, "little") + tiff[place + 10 :]


TWO_FRAMES = saved(picture(), "TIFF", save_all=True, append_images=[picture()])
FILES = [
    saved(picture(), "PNG", icc_profile=b"\0" * 16 + b"RGB " + b"\0" * 200),
    saved(picture(), "JPEG", progressive=True),
    saved(picture(), "WEBP"),
    saved(picture(), "BMP"),
    saved(picture(), "TIFF", compression="tiff_lzw", icc_profile=b"\0" * 16 + b"RGB " + b"\0" * 200),
    TWO_FRAMES,
    palette(transparency=3),
]


def looked_at(data: bytes) -> str:
    """The reason for which a file is refused, or "" for a picture."""
    try:
        image = decode_image(data, where="x")
    except UnusableImageError as error:
        return error.reason
    assert (image.dtype, image.shape[2]) == (np.uint8, 3)
    assert decode_picture(data, where="x", form="png").rgb.shape == image.shape
    is_plain_png(data)
    is_plain_jpeg(data)
    return ""


@pytest.mark.parametrize("frame", [0, 1])
def test_an_unknown_compression_in_any_frame_is_a_reason(frame: int) -> None:
    """Of a second frame Pillow's reader raises KeyError."""
    assert looked_at(compressed_as(TWO_FRAMES, 60_000, frame)) == "unreadable"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::DeprecationWarning:PIL")
def test_damage_anywhere_gives_a_picture_or_a_reason() -> None:
    """4200 damaged files from one seed: bytes anywhere and in headers, values of TIFF tags, cut ends."""
    rng = rng_for(0, "damage")
    found = set()
    for number in range(4200):
        data = bytearray(FILES[number % len(FILES)])
        reach = (64, 300, len(data))[number // len(FILES) % 3]
        for place in rng.integers(0, min(reach, len(data)), rng.integers(1, 6)):
            data[place] = rng.integers(256)
        if data[:4] == b"II*\0" and number % 2:
            data = bytearray(FILES[number % len(FILES)])
            place = rng.choice(tags(bytes(data)))
            data[place + rng.integers(2, 12)] = rng.integers(256)
        if number % 5 == 0:
            del data[rng.integers(len(data)) :]
        found.add(looked_at(bytes(data)))
    assert found >= {"", "unreadable", "truncated"}


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError(), RecursionError(), OSError(5, "")])
def test_whatever_a_decoder_raises_is_a_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    data = saved(picture(), "BMP")
    for place, reason in (("Image.open", "unreadable"), ("ImageOps.exif_transpose", "truncated")):
        with monkeypatch.context() as patched:
            patched.setattr(f"infra.imaging.images.{place}", broken)
            assert looked_at(data) == reason
            patched.setattr(f"infra.imaging.images.{place}", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
            with pytest.raises(MemoryError):
                decode_image(data, where="x")


def cmyk_profile() -> bytes:
    """An ICC profile (version 2, lut8) of four inks of which cyan prints red: Lab at the 16 corners of CMYK."""
    corners = [
        round(value)
        for c, m, y, k in itertools.product((0, 1), repeat=4)
        for value in (0 if k else 255 - 120 * max(c, m, y), 128 + 70 * c * (1 - k), 128 + 60 * c * (1 - k))
    ]
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + bytes(corners) + identity * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags, table, offset = b"", struct.pack(">I", 2), 128 + 4 + 2 * 12
    for name, content in ((b"A2B0", lut), (b"wtpt", white)):
        table += name + struct.pack(">II", offset + len(tags), len(content))
        tags += content + bytes(-len(content) % 4)
    head = bytes(8) + b"\x02\x40\0\0prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061)  # the illuminant D50
    head = struct.pack(">I", offset + len(tags)) + head[4:]
    return head + bytes(128 - len(head)) + table + tags


def test_cmyk_is_converted_on_request_by_its_profile() -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    plain, profiled = saved(cyan, "TIFF"), saved(cyan, "TIFF", icc_profile=cmyk_profile())
    assert looked_at(plain) == looked_at(profiled) == "cmyk"
    assert (decode_image(plain, where="x", convert=["cmyk"]) == (0, 255, 255)).all()
    red, green, blue = decode_image(profiled, where="x", convert=["cmyk"])[0, 0].tolist()
    assert red > 200 > 120 > max(green, blue)
    damaged = saved(cyan, "TIFF", icc_profile=b"no profile")
    with pytest.raises(UnusableImageError, match="colour profile is damaged"):
        decode_image(damaged, where="x", convert=["cmyk"])
    with pytest.raises(UnusableImageError, match="LAB"):
        decode_image(saved(picture("LAB"), "TIFF"), where="x", convert=["cmyk"])


def test_a_bare_png_is_decoded_as_pillow_does_and_refused_as_pillow_says() -> None:
    data = encode_png(PHOTO)
    assert (decode_image(data, where="x") == np.asarray(Image.open(io.BytesIO(data)))).all()
    assert looked_at(data + b"behind its end") == ""
    assert looked_at(data[: len(data) // 2]) == "truncated"
    at = data.index(b"IDAT") + 100
    assert looked_at(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) == "truncated"
    assert looked_at(data[:8]) == looked_at(data[:26]) == looked_at(data[:33]) == "unreadable"


def test_png_is_exact_and_the_same_each_time(tmp_path: Path) -> None:
    data = encode_png(PHOTO)
    assert encode_png(PHOTO.copy()) == data
    (tmp_path / "x.png").write_bytes(data)
    assert (read_image(str(tmp_path / "x.png")) == PHOTO).all()
    grey = PHOTO[..., 0].astype(np.uint16) * 257
    assert (cv2.imdecode(np.frombuffer(encode_png(grey), np.uint8), cv2.IMREAD_UNCHANGED) == grey).all()


def test_a_folder_is_listed_without_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ["a.jpg", "b/x.PNG"]
    other = ["notes.txt"]
    hidden = [
        *("._a.jpg", ".DS_Store", "Thumbs.db", "b/.hidden.png", ".thumbnails/a.png", "__MACOSX/b/._x.PNG"),
        *("__MACOSX/b/x.PNG", "b/@eaDir/x.PNG/SYNOPHOTO.jpg", "b/desktop.ini"),
    ]
    root = tmp_path / ".data"  # the folder itself may be hidden
    for name in (*shown, *other, *hidden):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(b"12")
    for folder in (str(root), f"{root}/"):
        assert [Path(uri).relative_to(root).as_posix() for uri in list_images(folder)] == shown
    assert list_images(str(root)) == {f"{root}/{name}": 2 for name in shown}
    assert f"{len(hidden)} hidden or system files left out" in capsys.readouterr().err


def test_what_is_no_folder_of_images_is_told_apart(tmp_path: Path, s3: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.png").write_bytes(b"1")
    (tmp_path / "notes" / "a.txt").write_bytes(b"1")
    write_bytes(f"{s3}/file.png", b"1")
    places = {
        f"{tmp_path}/absent": "no images: this file or folder does not exist",
        f"{s3}/absent": "no images: this file or folder does not exist",
        f"{tmp_path}/file.png": "this is a file; a folder is expected",
        f"{s3}/file.png": "this is a file; a folder is expected",
        f"{tmp_path}/empty": "no images",
        f"{tmp_path}/notes": "no images",
    }
    for folder, what in places.items():
        with pytest.raises(DataError, match=what) as caught:
            list_images(folder)
        assert caught.value.where == folder


def test_resizing_follows_pil_and_keeps_what_has_the_size() -> None:
    assert (resized(PHOTO, (40, 56)) == PHOTO).all()
    expected = np.asarray(Image.fromarray(PHOTO).resize((28, 20), Image.Resampling.BICUBIC))
    assert (resized(PHOTO, (20, 28)) == expected).all()
