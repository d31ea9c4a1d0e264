"""Colour correction of a restored image towards its up-scaled LR image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import ConfigError, DataError


def color_fix(image: Tensor, reference: Tensor, method: str, epsilon: float = 1e-5) -> Tensor:
    """`image` with the colours of `reference` (same shape); float (N, C, H, W) in [0, 1], the result is not clamped.

    "adain": per image and channel, mean and deviation of the reference (Huang & Belongie 2017), with `epsilon` added to
    the variances: 1e-5 in CCSR, 2.5e-6 is StableSR's 1e-5 on [-1, 1]. "wavelet": the low
    frequencies of the reference. "none": `image` itself. ConfigError on another method, DataError on unequal shapes.
    """
    if method == "none":
        return image
    if method not in ("adain", "wavelet"):
        raise ConfigError(f"unknown colour fix {method!r}", where="method", todo='choose "adain", "wavelet" or "none"')
    if image.shape != reference.shape:
        raise DataError(
            "image and reference differ in shape",
            where=f"{tuple(image.shape)} and {tuple(reference.shape)}",
            todo="resize the LR image to the size of the restored image",
        )
    if method == "wavelet":
        return image - _low_frequencies(image) + _low_frequencies(reference)
    mean, std = _statistics(image, epsilon)
    reference_mean, reference_std = _statistics(reference, epsilon)
    return (image - mean) / std * reference_std + reference_mean


class SmoothedColorFix:
    """`color_fix` of the frames of a sequence, one image (1, C, H, W) a call, in their order.

    "adain" is then: y = (x - mean_x) g_t + mean_r, with the frame's own means of image x and reference r, and per
    channel g_t = a g_(t-1) + (1 - a) std_r / std_x, a = `memory`. It begins anew at the first frame and where the
    reference changes by more than CUT from one frame to the next. The means are not smoothed: the reference's are those
    of the input.
    """

    CUT = 0.1  # mean absolute difference, of values in [0, 1]

    def __init__(self, memory: float = 0.8) -> None:
        self._memory, self._gain, self._before = memory, torch.empty(0), torch.empty(0)

    def __call__(self, image: Tensor, reference: Tensor, method: str, epsilon: float = 1e-5) -> Tensor:
        if method != "adain":
            return color_fix(image, reference, method, epsilon)
        mean, std = _statistics(image, epsilon)
        reference_mean, reference_std = _statistics(reference, epsilon)
        gain = reference_std / std
        if self._before.shape == reference.shape and (reference - self._before).abs().mean() <= self.CUT:
            gain = self._memory * self._gain + (1 - self._memory) * gain
        self._gain, self._before = gain, reference
        return (image - mean) * gain + reference_mean


def _statistics(image: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (N, C, 1, 1)."""
    variance, mean = torch.var_mean(image, dim=(2, 3), keepdim=True)
    return mean, (variance + epsilon).sqrt()


def _low_frequencies(image: Tensor) -> Tensor:
    """Five binomial 3x3 blurs, each at twice the dilation of the one before."""
    channels = image.shape[1]
    row = image.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(row, row).expand(channels, 1, 3, 3)
    for radius in (1, 2, 4, 8, 16):
        padded = F.pad(image, (radius,) * 4, mode="replicate")
        image = F.conv2d(padded, kernel, dilation=radius, groups=channels)
    return image
