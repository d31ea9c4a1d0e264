"""Floor 4: quality and stability of restorations, measured, reported and compared."""

from evaluation.metrics import niqe, psnr_y, sharpness, ssim_y
from evaluation.stability import StabilityAccumulator, g_std, l_std

__all__ = ["StabilityAccumulator", "g_std", "l_std", "niqe", "psnr_y", "sharpness", "ssim_y"]
