"""Whether the two images of an existing pair belong together: sizes, and content in the same place."""

import cv2
import numpy as np

from infra.imaging.images import UnusableImageError

MAX_SHIFT_PX = 1.5  # of the LR image
MIN_CORRELATION = 0.8
MIN_DEVIATION = 2.0  # grey levels; what is flatter cannot be compared


def check_pair(hr: np.ndarray, lr: np.ndarray, scale: int, *, where: str) -> None:
    """UnusableImageError unless HR (H, W, 3) is `scale` times LR (h, w, 3) in size and shows the same, both uint8 RGB.

    `pair_size`: another size. `pair_misaligned`: HR shrunk by area and LR, both as blurred grey levels (sigma 1 px, so
    that noise does not count), are shifted against each other by more than 1.5 LR px (phase correlation) or correlate
    by less than 0.8. Flat images pass.
    """
    height, width = lr.shape[:2]
    if hr.shape[:2] != (height * scale, width * scale):
        raise _refuse(
            "pair_size", f"HR {hr.shape[1]}x{hr.shape[0]} px is not {scale} times LR {width}x{height} px", where
        )
    small = cv2.resize(hr, (width, height), interpolation=cv2.INTER_AREA)
    one, other = (
        cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), 1) for image in (small, lr)
    )
    if min(one.std(), other.std()) < MIN_DEVIATION:
        return
    correlation = float(np.corrcoef(one.ravel(), other.ravel())[0, 1])
    window = cv2.createHanningWindow((width, height), cv2.CV_32F)
    (x, y), _ = cv2.phaseCorrelate(one - one.mean(), other - other.mean(), window)
    if correlation < MIN_CORRELATION or max(abs(x), abs(y)) > MAX_SHIFT_PX:
        raise _refuse(
            "pair_misaligned",
            f"HR and LR differ or are shifted (correlation {correlation:.2f}, shift {x:.1f}, {y:.1f} LR px)",
            where,
        )


def _refuse(reason: str, what: str, where: str) -> UnusableImageError:
    return UnusableImageError(what, where=where, todo="repair the pair or remove it", reason=reason)
