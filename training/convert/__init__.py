"""Published weights in: files of other projects become model directories."""

from training.convert.onestep import convert_onestep
from training.convert.published import convert_base, convert_stablesr, convert_v1, convert_v2

__all__ = ["convert_base", "convert_onestep", "convert_stablesr", "convert_v1", "convert_v2"]
