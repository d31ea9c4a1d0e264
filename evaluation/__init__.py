"""Floor 4: quality and stability of restorations, measured, reported and compared."""

from evaluation.metrics import niqe, sharpness, ssim_y
from evaluation.stability import g_std
from infra.pixels import StabilityAccumulator, l_std, psnr_y

__all__ = ["StabilityAccumulator", "g_std", "l_std", "niqe", "psnr_y", "sharpness", "ssim_y"]
