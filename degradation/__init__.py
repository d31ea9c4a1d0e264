"""Floor 2: HR -> LR on the CPU; pure functions without files, Ray or global random state."""

from degradation.config import DegradationConfig
from degradation.pipeline import DegradedPair, apply, degrade, draw
from degradation.presets import PRESETS, load_preset

__all__ = ["PRESETS", "DegradationConfig", "DegradedPair", "apply", "degrade", "draw", "load_preset"]
