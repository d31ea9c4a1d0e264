"""The degradation that a config names, and whether sources, crop and latents can take it."""

from collections.abc import Sequence

from degradation.config import DegradationConfig
from degradation.presets import load_preset
from infra.errors import ConfigError
from pipelines.sharding.config import CenterCrop, GridCrop, ListSource, PairsSource, ShardConfig, brings_lr


def resolve_degradation(config: ShardConfig) -> DegradationConfig | None:
    """The recipe that `degradation` names or spells out.

    ConfigError for an unknown name, a crop that it or existing pairs cannot take, and latents of images of any size.
    """
    recipe = load_preset(config.degradation) if isinstance(config.degradation, str) else config.degradation
    pairs = [source for source in config.sources if isinstance(source, PairsSource | ListSource) and brings_lr(source)]
    if pairs:
        _check_pairs(config, pairs)
    size = getattr(config.crop, "size_px", 0)
    scale = recipe.scale if recipe else pairs[0].scale if pairs else 1
    if size % scale:
        raise ConfigError(
            f"a crop of {size} px is no multiple of the degradation's scale, {scale}",
            where="crop.size_px",
            todo=f"write {size - size % scale}, for one",
        )
    if config.latents and (not size or size % 8 or (recipe is None and not pairs)):
        raise ConfigError(
            "latents need a crop of one size, a multiple of 8 px, and LR images",
            where="latents",
            todo="set `crop` to center, random or grid, and a `degradation`",
        )
    return recipe


def _check_pairs(config: ShardConfig, pairs: Sequence[PairsSource | ListSource]) -> None:
    wrong = None
    if config.degradation is not None:
        wrong = "degradation", "`pairs` sources bring their own LR images", "write `degradation: null`"
    elif len(pairs) < len(config.sources) or len({source.scale for source in pairs}) > 1:
        wrong = "sources", "do not mix `pairs` with other sources or scales", "make two sets; training takes several"
    elif config.scales != (1.0,) or config.short_side_px or isinstance(config.crop, CenterCrop):
        wrong = "crop", "an existing pair cannot be resized", "take `crop: {kind: random, ...}`, and no other scales"
    elif isinstance(config.crop, GridCrop) and config.crop.step_px % pairs[0].scale:
        wrong = "crop.step_px", "the windows would be off the LR's grid", "give a multiple of the scale"
    if wrong:
        where, what, todo = wrong
        raise ConfigError(what, where=where, todo=todo)
