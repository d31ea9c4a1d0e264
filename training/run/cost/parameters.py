"""The parameters of the networks, part by part, counted on modules without memory."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from infra.errors import ConfigError
from training.config import ModelConfig
from training.models import FeatureWrapping, OneStepAdapter, PatchDiscriminator, ProjectedDiscriminator
from training.models.build import build_adapter
from training.models.judges.vit import build_vit
from training.models.networks import build_networks

PAPER_MILLIONS = 1700.91  # CCSR in Table 2 of Sun et al., arXiv 2401.00877: all rows of "sd21"


def count(*networks: nn.Module) -> int:
    """Parameters of all `networks`."""
    parameters: Iterable[nn.Parameter] = (parameter for network in networks for parameter in network.parameters())
    return sum(parameter.numel() for parameter in parameters)


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
        adapter: Any = build_adapter(ModelConfig.model_validate({"preset": preset, "family": family}), unet, vae)
        wrapping = FeatureWrapping.for_vae(vae)
    encoder, decoder = count(vae.encoder, vae.quant_conv), count(vae.decoder, vae.post_quant_conv)
    if family == "stablesr":
        return [
            _row("UNet", count(unet)),
            _row("time-aware encoder", count(adapter.encoder), stage1=True),
            _row("feature modulation", count(adapter.sft), stage1=True),
            _row("VAE encoder", encoder),
            _row("VAE decoder", decoder),
            _row("feature wrapping", count(wrapping), stage2=True),
        ]
    if family == "onestep":
        return [
            _row("UNet", count(unet)),
            _row("LoRA of the UNet, and its first convolution", count(adapter.unet), stage1=True),
            _row("VAE encoder", encoder),
            _row("LoRA of the VAE encoder", count(adapter.vae), stage1=True),
            _row("VAE decoder", decoder),
        ]
    rows = [
        _row("UNet", count(unet)),
        _row("ControlNet", count(adapter), stage1=True),
        _row("VAE encoder", encoder),
        _row("VAE decoder", decoder, stage2=True),
    ]
    if preset == "sd21":
        rows += [_row("v1 only: condition encoder, a copy of the VAE's", encoder), _row("v1 only: text tower", _text())]
    return rows


def discriminator_table(width: int = 64) -> list[dict[str, str | int | bool]]:
    """Rows as in `parameter_table` of both discriminators, `width` the PatchGAN's; no model directory holds them."""
    with torch.device("meta"):
        patch = PatchDiscriminator(width)
        projected = ProjectedDiscriminator(build_vit("dino"), build_vit("dinov2"))
    return [
        _row("v1: PatchGAN", count(patch), stage2=True),
        _row("v2: discriminator's heads", count(projected.heads), stage2=True),
        _row("v2: DINO ViT-S/16 below them", count(projected.dino)),
        _row("v2: DINOv2 ViT-S/14, their condition", count(projected.dinov2)),
    ]


def regulariser_row(preset: str) -> dict[str, str | int | bool]:
    """A row of OSEDiff's second LoRA, which no model directory holds."""
    with torch.device("meta"):
        adapter = OneStepAdapter.for_networks({"unet": build_networks(preset)[1]}, conv_in=False)
    return _row("OSEDiff: regulariser, a LoRA of the UNet", count(adapter), stage1=True)


def _row(name: str, parameters: int, *, stage1: bool = False, stage2: bool = False) -> dict[str, str | int | bool]:
    return {"name": name, "parameters": parameters, "stage1": stage1, "stage2": stage2}


def _text() -> int:
    """OpenCLIP ViT-H/14's text tower (Ilharco et al., 2021): 24 blocks, width 1024, with its projection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, projection_dim=1024
    )
    with torch.device("meta"):
        return count(CLIPTextModelWithProjection(config))
