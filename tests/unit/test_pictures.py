"""Pictures of every kind through `ccsr restore`: what is kept, converted on request, or refused."""

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import typer
from photos import photo
from PIL import ExifTags, Image, ImageCms
from typer.testing import CliRunner

from infra.errors import ConfigError, DataError, PartialResultError
from infra.imaging.images import UnusableImageError, decode_image, encode_png
from infra.imaging.pictures import Picture, decode_picture, encode_picture, resized, to_8_bit
from pipelines.cli.main import app
from pipelines.cli.needs import needs_of
from pipelines.restore import RestoreConfig, restore
from tests.small_networks import smaller_tiny
from training.config import ModelConfig, SamplingConfig
from training.models import build_model, load_model, save_model
from training.restore.seeded_runs import decode_images, prepare_image, sample_rows

FORMS: tuple[Any, ...] = ("png", "jpg", "webp", "tiff")
LR = photo(20, 30)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    with smaller_tiny():
        save_model(build_model(ModelConfig(family="v2"), 1), folder)
    return str(folder)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def deep(height: int, width: int) -> np.ndarray:
    """uint16 (H, W, 3): a ramp that 8 bits show as stairs."""
    ramp = np.linspace(20_000, 24_000, height * width).reshape(height, width)
    return np.stack([ramp, ramp + 3_000, 40_000 - ramp], axis=-1).astype(np.uint16)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
def test_plain_pictures_are_read_as_elsewhere(mode: str, form: str) -> None:
    data = saved(Image.fromarray(LR).convert(mode), form)
    picture = decode_picture(data, where="x", form="jpg")
    np.testing.assert_array_equal(picture.rgb, decode_image(data, where="x"))
    assert picture.single == (mode in ("L", "1"))
    assert picture.alpha is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["colour", "grey", "single", "alpha"])
def test_what_is_written_is_read_again(form: Any, bits: int, kind: str) -> None:
    """Pixels, alpha, depth, profile and EXIF; through our reader and, of 8 bits, through Pillow's."""
    if (bits == 16 and form in ("jpg", "webp")) or (kind == "alpha" and form == "jpg"):
        return
    rgb = LR if bits == 8 else deep(20, 30)
    rgb = rgb if kind in ("colour", "alpha") else rgb[..., :1].repeat(3, axis=2)
    alpha = np.ascontiguousarray(rgb[::-1, :, 1]) if kind == "alpha" else None
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.IFD.Exif] = "Maker", {ExifTags.Base.DateTimeOriginal: "2026:11:30 12:00:00"}
    grey = kind in ("grey", "single")
    profile = SRGB if kind != "single" else None
    source = Picture(rgb, alpha, profile, exif.tobytes(), kind == "single")
    data = encode_picture(rgb, source, form, 100)
    found = decode_picture(data, where="x", form=form)
    assert not grey or np.ptp(found.rgb, axis=2).max() <= (2 if form == "webp" else 0)  # WebP has no grey mode
    assert found.single == (kind == "single" and form != "webp")
    assert found.rgb.dtype == rgb.dtype
    tolerance = {"jpg": 2, "webp": 8}.get(form, 0)  # WebP halves the colours' resolution
    assert np.abs(found.rgb.astype(int) - rgb).mean() <= tolerance
    if alpha is not None:
        np.testing.assert_array_equal(found.alpha, alpha)
    assert found.profile == profile
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.size == (30, 20)
        assert image.getexif()[ExifTags.Base.Make] == "Maker"
        assert image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] == "2026:11:30 12:00:00"


def test_exif_keeps_the_camera_and_the_position_only_on_request() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Model], exif[ExifTags.Base.Orientation] = "Camera 5", 6
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.ExifImageWidth: 30, ExifTags.Base.ISOSpeedRatings: 200}
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (47.0, 22.0, 1.0)}
    exif[ExifTags.Base.ImageWidth] = 30
    data = saved(Image.fromarray(LR), "JPEG", exif=exif, quality=95)
    for gps in (False, True):
        picture = decode_picture(data, where="x", form="jpg", gps=gps)
        assert picture.rgb.shape == (30, 20, 3)
        np.testing.assert_array_equal(picture.rgb, decode_image(data, where="x"))
        written = encode_picture(picture.rgb, picture, "jpg", 90)
        kept = Image.open(io.BytesIO(written)).getexif()
        assert dict(kept)[ExifTags.Base.Model] == "Camera 5"
        assert not {ExifTags.Base.Orientation, ExifTags.Base.ImageWidth} & set(kept)
        assert dict(kept.get_ifd(ExifTags.IFD.Exif)) == {ExifTags.Base.ISOSpeedRatings: 200}
        assert dict(kept.get_ifd(ExifTags.IFD.GPSInfo)) == ({1: "N", 2: (47.0, 22.0, 1.0)} if gps else {})
        assert not kept.get_ifd(ExifTags.IFD.IFD1)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_pictures_are_turned_as_eight_bits_are(form: str, orientation: int) -> None:
    """OpenCV reads 16 bits, Pillow 8: both upright."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    eight = saved(Image.fromarray(LR), form, exif=exif)
    if form == "PNG":
        sixteen = encode_png(LR.astype(np.uint16) * 257, exif=exif.tobytes())
    else:
        image = LR.astype(np.uint16) * 257
        plain = encode_picture(image, Picture(image, exif=exif.tobytes()), "tiff", 90)
        sixteen = plain
    upright = decode_picture(eight, where="x", form="png")
    picture = decode_picture(sixteen, where="x", form="png")
    assert picture.rgb.dtype == np.uint16
    np.testing.assert_array_equal(to_8_bit(picture.rgb), upright.rgb)


@pytest.mark.parametrize("convert", [False, True])
def test_a_damaged_deep_picture_is_refused(convert: bool) -> None:
    """OpenCV would fill what is missing with grey."""
    whole = encode_png(np.random.default_rng(0).integers(0, 65_536, (40, 40, 3), dtype=np.uint16))
    with pytest.raises(UnusableImageError) as caught:
        decode_picture(whole[: len(whole) // 2], where="x", form="png", convert=convert)
    assert caught.value.reason == "truncated"


def test_interpolation_at_16_bits_is_the_one_at_8() -> None:
    size = (52, 71)
    for image in (LR, LR[..., 0]):
        eight = resized(image, size, Image.Resampling.BICUBIC)
        sixteen = resized(image.astype(np.uint16) * 257, size, Image.Resampling.BICUBIC)
        assert sixteen.dtype == np.uint16
        assert np.abs(to_8_bit(sixteen).astype(int) - eight).max() <= 1


def refused(data: bytes, form: Any = "png") -> UnusableImageError:
    with pytest.raises(UnusableImageError) as caught:
        decode_picture(data, where="x", form=form)
    assert str(caught.value).count("\n") == 2
    return caught.value


def test_what_a_format_cannot_hold_is_refused_and_the_option_converts_it() -> None:
    cmyk = saved(Image.fromarray(LR).convert("CMYK"), "JPEG", quality=100)
    rgba = Image.fromarray(np.dstack([LR, np.full((20, 30), 51, np.uint8)]))
    clear, sixteen = saved(rgba), encode_png(deep(20, 30))
    for data, form, reason in ((cmyk, "png", "cmyk"), (clear, "jpg", "transparent"), (sixteen, "webp", "sixteen_bit")):
        error = refused(data, form)
        assert error.reason == reason
        assert "--convert" in error.todo

    def converted(data: bytes, form: Any) -> np.ndarray:
        picture = decode_picture(data, where="x", form=form, convert=True)
        assert picture.alpha is None
        assert picture.rgb.dtype == np.uint8
        return picture.rgb.astype(int)

    assert np.abs(converted(cmyk, "png") - LR).mean() < 4
    assert np.abs(converted(clear, "jpg") - (0.2 * LR.astype(float) + 0.8 * 255)).max() <= 1
    np.testing.assert_array_equal(converted(sixteen, "webp"), to_8_bit(deep(20, 30)))
    kept = decode_picture(clear, where="x", form="webp", convert=True)
    assert kept.alpha is not None, "what a format holds is not converted"
    floats = saved(Image.fromarray(LR[..., 0].astype(np.float32)), "TIFF")
    assert refused(floats).reason == "sixteen_bit"


def run(model: str, tmp_path: Path, config: RestoreConfig, **sources: bytes) -> dict[str, bytes]:
    (tmp_path / "in").mkdir()
    for name, data in sources.items():
        (tmp_path / "in" / name.replace("_", ".")).write_bytes(data)
    restore(f"{tmp_path}/in", f"{tmp_path}/out", model, config)
    return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}


FAST = RestoreConfig(scale=2, sampling=SamplingConfig(num_steps=3))


def test_a_restoration_keeps_alpha_grey_depth_and_format(model: str, tmp_path: Path) -> None:
    grey = Image.fromarray(LR[..., 0])
    alpha = np.linspace(0, 255, 600).reshape(20, 30).astype(np.uint8)
    config = FAST.model_copy(update={"format": "input"})
    written = run(
        model,
        tmp_path,
        config,
        grey_jpeg=saved(grey, "JPEG", quality=95),
        clear_webp=saved(Image.fromarray(np.dstack([LR, alpha])), "WEBP", lossless=True),
        deep_tif=encode_picture(deep(20, 30), Picture(deep(20, 30)), "tiff", 90),
        flat_bmp=saved(Image.fromarray(LR), "BMP"),
    )
    assert written.keys() == {"grey.jpeg", "clear.webp", "deep.tif", "flat.png", "run.json"}
    with Image.open(io.BytesIO(written["grey.jpeg"])) as image:
        assert (image.mode, image.size) == ("L", (60, 40))
    clear = decode_picture(written["clear.webp"], where="x", form="webp")
    np.testing.assert_array_equal(clear.alpha, resized(alpha, (40, 60), Image.Resampling.BICUBIC))
    sixteen = decode_picture(written["deep.tif"], where="x", form="tiff").rgb
    assert sixteen.dtype == np.uint16
    assert len(np.unique(sixteen % 257)) > 200, "more than 8 bits are used"


def test_a_picture_of_16_bits_that_holds_8_is_restored_as_of_8(model: str, tmp_path: Path) -> None:
    deeper = LR.astype(np.uint16) * 257
    for folder, data in (("a", encode_png(LR)), ("b", encode_png(deeper))):
        (tmp_path / folder).mkdir()
        run(model, tmp_path / folder, FAST, x_png=data)
    eight, sixteen = (cv2.imread(str(tmp_path / n / "out" / "x.png"), cv2.IMREAD_UNCHANGED) for n in "ab")
    assert (eight.dtype, sixteen.dtype) == (np.uint8, np.uint16)
    assert np.abs(sixteen / 257 - eight).max() < 3  # the enlarged input is not rounded to 8 bits
    assert np.abs(sixteen / 257 - eight).mean() < 0.6


def test_side_by_side_holds_the_enlarged_input_and_the_result(model: str, tmp_path: Path) -> None:
    for folder, beside in (("a", False), ("b", True)):
        (tmp_path / folder).mkdir()
        run(model, tmp_path / folder, FAST.model_copy(update={"side_by_side": beside}), x_png=encode_png(LR))
    alone, both = (np.asarray(Image.open(tmp_path / name / "out" / "x.png")) for name in "ab")
    np.testing.assert_array_equal(both[:, :60], resized(LR, (40, 60), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(both[:, 60:], alone)


def test_the_output_files_suffix_is_its_format(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(LR))
    command = ["restore", f"{tmp_path}/a.png", f"{tmp_path}/big.jpg", "--model", model, "--scale", "2", "--steps", "3"]
    done = CliRunner().invoke(app, [*command, "--quality", "80", "--device", "cpu"])
    assert done.exit_code == 0, done.exception
    with Image.open(tmp_path / "big.jpg") as image:
        assert (image.format, image.size) == ("JPEG", (60, 40))
    done = CliRunner().invoke(app, [*command, "--format", "png", "--device", "cpu"])
    assert isinstance(done.exception, ConfigError)
    assert "results are PNG files" in str(done.exception)


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    ccsr = typer.main.get_command(app)
    command = ["restore", "in", f"{tmp_path}/out", "--model", "m"]
    for options, what in (
        (["--quality", "80"], "quality"),
        (["--format", "gif"], "format"),
        (["--fp16", "--dtype", "float32"], "differ"),
    ):
        with pytest.raises(ConfigError, match=what):
            needs_of(ccsr, [*command, *options])
    with pytest.raises(ConfigError, match="float16 needs a GPU"):
        restore(str(tmp_path), f"{tmp_path}/out", "m", RestoreConfig(dtype="float16"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predicts_x0_in_float32(model: str, dtype: torch.dtype) -> None:
    """Run on a CPU here; the command takes float16 on a GPU only. Overflow is an error, not a black picture."""
    networks = load_model(model, dtype=dtype)
    config = SamplingConfig(num_steps=3)
    image = prepare_image(networks, LR, (40, 60), config, key="x")
    seen: list[tuple[int, torch.dtype]] = []
    latents = sample_rows(networks, [(image, 0)], config, 0, lambda t, x0: seen.append((t, x0.dtype)))
    assert seen[0] == (999, torch.float32)
    assert {found for _, found in seen} == {torch.float32}
    with pytest.raises(DataError, match="overflowed"):
        list(decode_images(networks, latents * float("inf"), [image], config))


def test_transparent_pictures_do_not_go_into_jpeg_unasked(model: str, tmp_path: Path) -> None:
    data = saved(Image.fromarray(np.dstack([LR, LR[..., 0]])))
    with pytest.raises(PartialResultError, match=r"1 of 1 .* 1 transparent \(x.png\)"):
        run(model, tmp_path, FAST.model_copy(update={"format": "jpg"}), x_png=data)
