"""Samplers, schedules, tiles and colour correction: free functions in plain PyTorch."""

from training.sampling.color import SmoothedColorFix, color_fix
from training.sampling.samplers import (
    Denoise,
    DrawNoise,
    guided,
    sample_ccsr_v1,
    sample_ccsr_v2,
    sample_uniform,
    starting_point,
)
from training.sampling.schedules import add_noise, ccsr_v1_timesteps, ccsr_v2_timesteps, predict_x0
from training.sampling.tiles import tile_grid, tile_weights, tiled

__all__ = [
    "Denoise",
    "DrawNoise",
    "SmoothedColorFix",
    "add_noise",
    "ccsr_v1_timesteps",
    "ccsr_v2_timesteps",
    "color_fix",
    "guided",
    "predict_x0",
    "sample_ccsr_v1",
    "sample_ccsr_v2",
    "sample_uniform",
    "starting_point",
    "tile_grid",
    "tile_weights",
    "tiled",
]
