"""How many parameters a model has, counted on modules without memory; `ccsr estimate` prints the table."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from infra.errors import ConfigError
from training.config import ModelConfig
from training.models.build import build_adapter
from training.models.discriminators import PatchDiscriminator, ProjectedDiscriminator
from training.models.networks import build_networks
from training.models.vit import build_vit
from training.models.wrapping import FeatureWrapping

PAPER_MILLIONS = 1700.91  # CCSR in Table 2 of Sun et al., arXiv 2401.00877: all rows of "sd21"


def parameter_table(preset: str, family: str = "v1") -> list[dict[str, str | int | bool]]:
    """Rows of name, parameters, and whether stage 1 and stage 2 train them.

    For CCSR's "sd21" two more rows hold what v1's checkpoint carries beside the networks and a model directory does
    not: a copy of the VAE's encoder and the OpenCLIP-H text tower with all 24 blocks. All rows sum to the paper's
    1700.91 M.
    Building transformers' text tower takes some seconds of import. Raises ConfigError for an unknown preset.
    """
    if preset not in ("tiny", "sd21"):
        raise ConfigError(f"no preset is called {preset!r}", where="model.preset", todo="choose 'tiny' or 'sd21'")
    with torch.device("meta"):
        vae, unet = build_networks(preset)
        adapter: Any = build_adapter(ModelConfig.model_validate({"preset": preset, "family": family}), unet)
        wrapping = FeatureWrapping.for_vae(vae)
    encoder, decoder = _count(vae.encoder, vae.quant_conv), _count(vae.decoder, vae.post_quant_conv)
    if family == "stablesr":
        return [
            _row("UNet", _count(unet)),
            _row("time-aware encoder", _count(adapter.encoder), stage1=True),
            _row("feature modulation", _count(adapter.sft), stage1=True),
            _row("VAE encoder", encoder),
            _row("VAE decoder", decoder),
            _row("feature wrapping", _count(wrapping), stage2=True),
        ]
    rows = [
        _row("UNet", _count(unet)),
        _row("ControlNet", _count(adapter), stage1=True),
        _row("VAE encoder", encoder),
        _row("VAE decoder", decoder, stage2=True),
    ]
    if preset == "sd21":
        rows += [_row("v1 only: condition encoder, a copy of the VAE's", encoder), _row("v1 only: text tower", _text())]
    return rows


def discriminator_table() -> list[dict[str, str | int | bool]]:
    """Rows as in `parameter_table` of the full-size discriminators; no model directory holds them."""
    with torch.device("meta"):
        patch = PatchDiscriminator()
        projected = ProjectedDiscriminator(build_vit("dino"), build_vit("dinov2"))
    return [
        _row("v1: PatchGAN", _count(patch), stage2=True),
        _row("v2: discriminator's heads", _count(projected.heads), stage2=True),
        _row("v2: DINO ViT-S/16 below them", _count(projected.dino)),
        _row("v2: DINOv2 ViT-S/14, their condition", _count(projected.dinov2)),
    ]


def _row(name: str, parameters: int, *, stage1: bool = False, stage2: bool = False) -> dict[str, str | int | bool]:
    return {"name": name, "parameters": parameters, "stage1": stage1, "stage2": stage2}


def _count(*networks: nn.Module) -> int:
    parameters: Iterable[nn.Parameter] = (parameter for network in networks for parameter in network.parameters())
    return sum(parameter.numel() for parameter in parameters)


def _text() -> int:
    """OpenCLIP ViT-H/14's text tower (Ilharco et al., 2021): 24 blocks, width 1024, with its projection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, projection_dim=1024
    )
    with torch.device("meta"):
        return _count(CLIPTextModelWithProjection(config))
