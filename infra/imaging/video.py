"""Video files by PyAV (extra `[video]`): 8-bit RGB frames out of one, H.264 beside the same audio into another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infra.errors import ConfigError, DataError, line_of

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
WRITTEN = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""FFmpeg's name of the format of an output by its suffix."""
CRF = "14"  # x264's constant quality; 18 counts as visually lossless


class VideoInfo(NamedTuple):
    """`size`: (height, width) of the frames, upright; `rate`: frames a second; `pixel_aspect`: width / height."""

    size: tuple[int, int]
    num_frames: int
    rate: Fraction
    pixel_aspect: Fraction


def probe(path: Path, where: str) -> VideoInfo:
    """Decode all frames once, so that nothing is found after hours of work.

    ConfigError without PyAV; DataError for a file without a video stream or frames, with damaged or interlaced frames,
    frames of unequal size, another depth than 8 bits, alpha, or a frame rate that varies: a frame that is more than a
    millisecond (or one tick of the file's clock, if that is coarser) from its place between first and last.
    """

    def refuse(what: str, how: str) -> DataError:
        return DataError(what, where=where, todo=f"convert it: ffmpeg -i IN {how} OUT.mp4")

    times: list[Fraction] = []
    size = None
    with _opened(path, where) as source:
        for frame in _frames(source):
            kind = frame.format
            if size is None and (kind.components[0].bits > 8 or any(part.is_alpha for part in kind.components)):
                raise refuse(f"{kind.name} has more than 8 bits or alpha", "-pix_fmt yuv420p")
            found = _upright_size(frame)
            if found != (size := size or found):
                what = f"frame {len(times)} has {found[1]}x{found[0]} px, those before it {size[1]}x{size[0]}"
                raise refuse(what, f"-vf scale={size[1]}:{size[0]}")
            if frame.is_corrupt:
                raise refuse(f"frame {len(times)} is damaged", "-fps_mode cfr")
            if frame.interlaced_frame:
                raise refuse(f"frame {len(times)} is interlaced", "-vf yadif")
            if frame.pts is None:
                raise refuse(f"frame {len(times)} has no time", "-fps_mode cfr")
            times.append(frame.pts * frame.time_base)
        video = source.streams.video[0]
        tick = frame.time_base if times else Fraction(0)
        rate = video.average_rate if times else None
        aspect = video.sample_aspect_ratio or Fraction(1)
        if times and frame.rotation % 180:
            aspect = 1 / aspect
    if size is None:
        raise DataError("the video has no frames", where=where, todo="give a file that a player shows")
    if len(times) > 1:
        step = (times[-1] - times[0]) / (len(times) - 1)
        limit = max(tick, Fraction(1, 1000))
        late = (n for n, time in enumerate(times) if step <= 0 or abs(time - times[0] - n * step) > limit)
        if (off := next(late, None)) is not None:
            how = f"-fps_mode cfr -r {float(rate or 25):g}"
            raise refuse(f"the frame rate varies: frame {off} is not at its place", how)
        rate = rate or 1 / step
    return VideoInfo(size, len(times), rate or Fraction(25), aspect)


def convert(
    path: Path,
    target: Path,
    form: str,
    size: tuple[int, int],
    change: Callable[[np.ndarray], np.ndarray],
    info: VideoInfo,
    where: str,
) -> None:
    """Write `target` in the format `form` (of WRITTEN) with `change` of each frame, in H.264.

    `info` is `probe`'s. `change` is given uint8 RGB (h, w, 3), upright, and returns that of `size` = (H, W), both even.
    Audio packets are
    copied; frames keep their times, pixel aspect and colour matrix, which is named (where the file names none: BT.709
    from 720 lines on, else BT.601). Subtitles, chapters and metadata are left out. DataError where `form` cannot hold
    the audio.
    """
    import av

    with _opened(path, where) as source, av.open(str(target), "w", format=form) as out:
        video = source.streams.video[0]
        stream = out.add_stream("libx264", rate=info.rate, options={"crf": CRF})
        stream.height, stream.width = size
        context = stream.codec_context
        context.pix_fmt, context.time_base = "yuv420p", video.time_base
        context.sample_aspect_ratio = info.pixel_aspect
        space, number = _colour_space(video)
        context.colorspace, context.color_range = number, 1  # 1: limited
        context.color_primaries, context.color_trc = video.codec_context.color_primaries, video.codec_context.color_trc
        try:
            copies = {audio: out.add_stream_from_template(audio) for audio in source.streams.audio}
            out.start_encoding()
        except (av.FFmpegError, ValueError) as error:
            what = f"{form} cannot hold the audio ({line_of(error)})"
            raise DataError(what, where=where, todo="give OUTPUT as NAME.mkv") from error
        for packet in source.demux(video, *copies):
            if packet.stream in copies:
                if packet.dts is not None:  # the last one is empty
                    packet.stream = copies[packet.stream]
                    out.mux(packet)
                continue
            for frame in packet.decode():
                new = av.VideoFrame.from_ndarray(change(_pixels(frame, space)), format="rgb24")
                new = new.reformat(
                    format="yuv420p", dst_colorspace=space, dst_color_range="MPEG", interpolation="BICUBIC"
                )
                new.pts, new.time_base = frame.pts, frame.time_base
                out.mux(stream.encode(new))
        out.mux(stream.encode(None))


@contextmanager
def _opened(path: Path, where: str) -> Iterator[Any]:
    try:
        import av
    except ImportError as error:
        todo = "pip install 'ccsr-cluster[video]', or restore a folder of its frames"
        raise ConfigError("video files need the package av, which is not installed", where=where, todo=todo) from error
    try:
        with av.open(str(path)) as source:
            if not source.streams.video:
                raise DataError("the file has no video stream", where=where, todo="give a file that a player shows")
            yield source
    except av.FFmpegError as error:
        if isinstance(error, OSError) and error.filename != str(path):  # of the output: a full disk
            raise
        raise DataError(f"not a readable video ({line_of(error)})", where=where, todo="copy the file again") from error


def _frames(source: Any) -> Iterator[Any]:
    for packet in source.demux(source.streams.video[0]):
        yield from packet.decode()


def _upright_size(frame: Any) -> tuple[int, int]:
    return (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)


def _colour_space(video: Any) -> tuple[str, int]:
    """FFmpeg's name of the matrix between RGB and YUV, and its number in H.273."""
    named, height = video.codec_context.colorspace, video.codec_context.height
    is_709 = height >= 720 if named == 2 else named == 1  # 2: not said, players then go by the height
    return ("ITU709", 1) if is_709 else ("BT2020", 9) if named == 9 else ("ITU601", 6)


def _pixels(frame: Any, space: str) -> np.ndarray:
    """uint8 RGB (H, W, 3), upright."""
    rgb = frame.reformat(
        format="rgb24", src_colorspace=space, src_color_range=frame.color_range, interpolation="BICUBIC"
    ).to_ndarray()
    return np.ascontiguousarray(np.rot90(rgb, frame.rotation // 90))
