"""Videos: what is read, refused and written, and a film through `ccsr restore`."""

import resource
import struct
import sys
import wave
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from photos import photo
from typer.testing import CliRunner

from evaluation import temporal_std
from infra.errors import CcsrError, ConfigError, DataError, StorageError
from infra.files.publish import staging
from infra.imaging.images import encode_png, read_image
from infra.imaging.pictures import resized
from infra.imaging.video import convert, probe
from pipelines.cli.main import app
from tests.small_networks import smaller_tiny
from training.config import ModelConfig
from training.models import build_model, save_model
from training.sampling import SmoothedColorFix, color_fix

PAN = photo(34, 60)


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as source:
        return [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]


def packets_of(path: Path) -> list[bytes]:
    with av.open(str(path)) as source:
        return [bytes(packet) for packet in source.demux(audio=0) if packet.size]


def write(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    rate: Fraction = Fraction(24),
    times: Sequence[int] | None = None,
    audio: str | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    **context: Any,
) -> Path:
    """A video of uint8 RGB frames (with `audio`, a codec, a tone too); `times`: of the frames, in 1 / rate."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, options={"crf": "0"} if codec == "libx264" else {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        sound = out.add_stream(audio, rate=16_000, layout="mono") if audio else None
        for number, frame in enumerate(frames):
            new = av.VideoFrame.from_ndarray(frame, format="rgb24")
            new.pts, new.time_base = (times[number] if times else number), 1 / rate
            out.mux(stream.encode(new))
        if sound is not None:
            for number in range(16):
                tone = (np.sin(np.arange(1024) / 5 + number) * 9000).astype(np.int16)[None]
                block = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
                block.sample_rate, block.pts, block.time_base = 16_000, number * 1024, Fraction(1, 16_000)
                out.mux(sound.encode(block))
            out.mux(sound.encode(None))
        out.mux(stream.encode(None))
    return path


def pan(count: int) -> list[np.ndarray]:
    return [PAN[:32, n : n + 36] for n in range(count)]


def enlarge(frame: np.ndarray) -> np.ndarray:
    return frame.repeat(2, axis=0).repeat(2, axis=1)


def converted(path: Path, target: Path, form: str = "mp4") -> Path:
    info = probe(path, "film")
    convert(path, target, form, (2 * info.size[0], 2 * info.size[1]), enlarge, info, "film")
    return target


@pytest.mark.parametrize(("name", "rate"), [("a.mp4", "24"), ("a.mkv", "30000/1001"), ("a.avi", "25")])
def test_frames_times_and_audio_survive(tmp_path: Path, name: str, rate: str) -> None:
    """Matroska's clock has milliseconds, so that neighbouring frames are 33 and 34 of them apart."""
    codec = {"a.avi": "mpeg4"}.get(name, "libx264")
    source = write(
        tmp_path / name, pan(9), rate=Fraction(rate), audio="mp2" if codec == "mpeg4" else "aac", codec=codec
    )
    info = probe(source, "film")
    assert (info.size, info.num_frames) == ((32, 36), 9)
    assert float(info.rate) == pytest.approx(float(Fraction(rate)), rel=1e-3)
    target = converted(source, tmp_path / "out.mkv", "matroska")
    again = probe(target, "film")
    assert (again.size, again.num_frames) == ((64, 72), 9)
    assert float(again.rate) == pytest.approx(float(info.rate), rel=1e-3)
    assert packets_of(target) == packets_of(source), "audio is copied, not encoded again"
    for before, after in zip(frames_of(source), frames_of(target), strict=True):
        assert np.abs(enlarge(before).astype(int) - after).mean() < 4


@pytest.mark.parametrize(("named", "height"), [(1, 32), (6, 32), (9, 32), (2, 32), (2, 720)])
def test_colours_are_those_that_a_player_shows(tmp_path: Path, named: int, height: int) -> None:
    """Three matrices, named or (2) not, when players go by the height; ours is named, as enlarging changes that."""
    colour = np.full((height, 64, 3), (200, 60, 30), np.uint8)
    space, number = {1: ("ITU709", 1), 9: ("BT2020", 9)}.get(1 if height == 720 else named, ("ITU601", 6))
    write(tmp_path / "a.mp4", [colour], colorspace=named, color_range=1)
    seen: list[np.ndarray] = []
    info = probe(tmp_path / "a.mp4", "film")
    keep = lambda frame: seen.append(frame) or enlarge(frame)  # noqa: E731
    convert(tmp_path / "a.mp4", tmp_path / "b.mp4", "mp4", (2 * height, 128), keep, info, "film")
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "b.mp4")) as target:
        frame = next(source.decode(video=0))
        shown = frame.reformat(format="rgb24", src_colorspace=space).to_ndarray()
        assert np.abs(seen[0].astype(int) - shown).max() <= 1
        assert target.streams.video[0].codec_context.colorspace == number
        after = next(target.decode(video=0)).reformat(format="rgb24", src_colorspace=space).to_ndarray()
        assert np.abs(after.astype(int) - shown[0, 0]).max() <= 5, (
            "rounded twice; the other matrix would be 20 levels off"
        )


def test_a_telephones_film_is_upright(tmp_path: Path) -> None:
    """Its display matrix, here written into the file, turns it by 90 degrees clockwise."""
    source = write(tmp_path / "a.mp4", pan(3), sample_aspect_ratio=Fraction(4, 3))
    data = bytearray(source.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    assert struct.unpack(">3i", data[place : place + 12]) == (1 << 16, 0, 0)
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    source.write_bytes(data)
    info = probe(source, "film")
    assert (info.size, info.pixel_aspect) == ((36, 32), Fraction(3, 4))
    (first, *_) = frames_of(converted(source, tmp_path / "b.mp4"))
    assert probe(tmp_path / "b.mp4", "film").pixel_aspect == Fraction(3, 4)
    assert np.abs(first.astype(int) - enlarge(np.rot90(pan(1)[0], -1))).mean() < 6


def mjpeg(path: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Frames of any size: whole JPEGs, which a camera's stream may change in the middle."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=24)
        stream.height, stream.width, stream.pix_fmt = *sizes[0], "yuvj420p"
        out.start_encoding()
        for number, size in enumerate(sizes):
            context = av.CodecContext.create("mjpeg", "w")
            context.height, context.width = size
            context.pix_fmt, context.time_base = "yuvj420p", Fraction(1, 24)
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 90, np.uint8), format="rgb24")
            for packet in [*context.encode(frame.reformat(format="yuvj420p")), *context.encode(None)]:
                packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 24)
                out.mux(packet)
    return path


def wav(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 800, "NONE", ""))
        file.writeframes(bytes(1600))
    return path


def empty(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        sound = out.add_stream("aac", rate=16_000, layout="mono")
        block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        block.sample_rate = 16_000
        out.mux([*sound.encode(block), *sound.encode(None)])
    return path


REFUSED: dict[str, tuple[Any, str]] = {
    "variable": (lambda path: write(path, pan(6), times=[0, 1, 2, 4, 5, 6]), "the frame rate varies: frame 1"),
    "unequal": (
        lambda path: mjpeg(path, [(32, 32), (32, 32), (48, 32)]),
        "frame 2 has 32x48 px, those before it 32x32",
    ),
    "deep": (lambda path: write(path, pan(2), pix_fmt="yuv420p10le"), "more than 8 bits"),
    "sound": (wav, "no video stream"),
    "empty": (empty, "the video has no frames"),
    "text": (lambda path: path.write_text("no video") and path, "not a readable video"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_restored_is_three_lines(tmp_path: Path, kind: str) -> None:
    make, what = REFUSED[kind]
    path = make(tmp_path / ("film.wav" if kind == "sound" else "film.mkv"))
    with pytest.raises(DataError, match=what) as caught:
        probe(path, "film.mkv")
    assert str(caught.value).count("\n") == 2
    assert "film.mkv" in str(caught.value)


def test_audio_that_the_output_cannot_hold_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a.mkv", pan(2), audio="wavpack")
    with pytest.raises(DataError, match=r"mp4 cannot hold the audio.*\n.*\n.*NAME.mkv"):
        converted(source, tmp_path / "b.mp4")
    converted(source, tmp_path / "b.mkv", "matroska")


def test_a_full_disk_is_the_outputs_error_and_leaves_nothing(tmp_path: Path) -> None:
    source, target = write(tmp_path / "a.mkv", pan(9)), tmp_path / "b.mp4"
    info, limits = probe(source, "film"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot write") as caught, staging(str(target)) as partial:
            convert(source, partial, "mp4", (64, 72), enlarge, info, "film")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.where == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"package av.*\n.*\n.*ccsr-cluster\[video\]"):
        probe(tmp_path / "a.mp4", "a.mp4")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["in", "out.mp4"], "INPUT is no video"),
        (["a.mp4", "out"], "OUTPUT is no .mp4"),
        (["a.mp4", "a.mp4"], "OUTPUT is INPUT"),
        (["a.mp4", "b.mp4", "--runs", "2"], "several runs"),
        (["a.mp4", "b.mp4", "--ray", "--device", "cpu"], "one process"),
        (["a.mp4", "b.mp4", "--format", "jpg"], "of pictures"),
        (["a.mp4", "b.mp4", "--format", "png"], "of pictures"),
        (["a.mp4", "b.mp4", "--noise", "image"], "share one noise"),
        (["a.mp4", "b.mp4", "--set", "runtime.rows_at_once=2"], "one by one"),
    ],
)
def test_options_that_a_video_cannot_have(arguments: list[str], what: str) -> None:
    error = CliRunner().invoke(app, ["restore", *arguments, "--model", "m"]).exception
    assert isinstance(error, ConfigError), error
    assert what in str(error)
    assert str(error).count("\n") == 2


def test_adains_gain_is_smoothed_and_begins_anew_at_a_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(1, 3, 16, 16, generator=generator)
    images = [torch.randn(1, 3, 16, 16, generator=generator) * scale + 0.1 * scale for scale in (1.0, 1.5, 0.7)]
    fix = SmoothedColorFix(0.8)
    fixed = [fix(image, reference, "adain") for image in images]
    torch.testing.assert_close(fixed[0], color_fix(images[0], reference, "adain"))
    gains = [reference.std((2, 3), correction=1) / image.std((2, 3), correction=1) for image in images]
    expected = gains[0]
    for image, result, gain in zip(images[1:], fixed[1:], gains[1:], strict=True):
        expected = 0.8 * expected + 0.2 * gain
        torch.testing.assert_close(result.mean((2, 3)), reference.mean((2, 3)))
        torch.testing.assert_close(result.std((2, 3)) / image.std((2, 3)), expected, rtol=1e-3, atol=1e-4)
    cut = 1 - reference
    torch.testing.assert_close(fix(images[0], cut, "adain"), color_fix(images[0], cut, "adain"))
    torch.testing.assert_close(fix(images[0], cut, "wavelet"), color_fix(images[0], cut, "wavelet"))


@pytest.mark.slow
def test_a_film_through_the_command(tmp_path: Path) -> None:
    """24 frames with sound: one noise, so that they flicker less than frames restored one by one; kept by a rerun."""
    with smaller_tiny():
        model = build_model(ModelConfig(family="v2"), 1)
        for parameter in model.unet.parameters():  # random weights hardly follow their noise
            parameter.data *= 1.5
        save_model(model, tmp_path / "model")
    source = write(tmp_path / "film.mp4", pan(24), audio="aac")
    command = ["restore", str(source), f"{tmp_path}/large.mp4", "--model", f"{tmp_path}/model", "--steps", "3"]
    command += ["--scale", "2", "--device", "cpu"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.exception
    assert "24 frames" in done.output
    large = frames_of(tmp_path / "large.mp4")
    assert [frame.shape for frame in large] == [(64, 72, 3)] * 24
    assert packets_of(tmp_path / "large.mp4") == packets_of(source)
    assert sorted(path.name for path in tmp_path.glob("large.mp4*")) == ["large.mp4", "large.mp4.run.json"]
    before = (tmp_path / "large.mp4").stat().st_mtime_ns
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (tmp_path / "large.mp4").stat().st_mtime_ns == before
    other = CliRunner().invoke(app, [*command, "--seed", "1"]).exception
    assert isinstance(other, CcsrError)
    assert "made from something else" in str(other)

    small = frames_of(source)
    (tmp_path / "in").mkdir()
    for number, frame in enumerate(small):
        (tmp_path / "in" / f"{number:02d}.png").write_bytes(encode_png(frame))
    command = ["restore", f"{tmp_path}/in", f"{tmp_path}/out", "--model", f"{tmp_path}/model", "--steps", "3"]
    assert CliRunner().invoke(app, [*command, "--scale", "2", "--device", "cpu"]).exit_code == 0
    alone = [read_image(f"{tmp_path}/out/{number:02d}.png") for number in range(24)]
    inputs = [resized(frame, (64, 72), 3) for frame in small]
    assert temporal_std(large, inputs) < 0.7 * temporal_std(alone, inputs)
