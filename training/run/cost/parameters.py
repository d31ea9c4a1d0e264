"""`ccsr estimate`: the parameters of networks, part by part, counted on modules without memory."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from infra.display.table import Table
from infra.errors import ConfigError
from training.config import ModelConfig, TrainConfig
from training.models import OneStepAdapter, PatchDiscriminator, ProjectedDiscriminator, build_model
from training.models.judges.vit import build_vit
from training.models.networks import build_networks

PAPER_MILLIONS = 1700.91  # CCSR in Table 2 of Sun et al., arXiv 2401.00877: `parameter_table` and `v1_parts` of "sd21"


class Part(NamedTuple):
    """Parameters of a part, and the stage that trains it, where one does; 1: stage 0 too."""

    name: str
    parameters: int
    stage: int | None = None


def count(*networks: nn.Module) -> int:
    """Parameters of all `networks`."""
    parameters: Iterable[nn.Parameter] = (parameter for network in networks for parameter in network.parameters())
    return sum(parameter.numel() for parameter in parameters)


def parameter_table(preset: str, family: str = "v1", stage: int = 1) -> list[Part]:
    """The parts of a model directory that `stage` writes. Raises ConfigError for an unknown preset."""
    if preset not in ("tiny", "sd21"):
        raise ConfigError(f"no preset is called {preset!r}", where="model.preset", todo="choose 'tiny' or 'sd21'")
    config = ModelConfig.model_validate({"preset": preset, "family": family})
    with torch.device("meta"):
        model = build_model(config, 0)
        if stage == 2:
            model.prepare_stage2(0)
    vae, facts = model.vae, config.facts
    return [
        Part("UNet", count(model.unet)),
        *(Part(name, count(part), 1) for name, part in model.adapter_parts.items()),
        Part("VAE encoder", count(vae.encoder, vae.quant_conv)),
        Part("VAE decoder", count(vae.decoder, vae.post_quant_conv), None if facts.frozen_decoder else 2),
        *(Part("feature wrapping", count(part), 2) for name, part in model.networks.items() if name == "wrapping"),
    ]


def v1_parts() -> list[Part]:
    """What v1's published checkpoint holds beside the networks of a model directory: a copy of the VAE's encoder and
    the OpenCLIP-H text tower with all 24 blocks."""
    with torch.device("meta"):
        vae, _ = build_networks("sd21")
    encoder = count(vae.encoder, vae.quant_conv)
    return [Part("v1 only: condition encoder, a copy of the VAE's", encoder), Part("v1 only: text tower", _text())]


def critic_parts(kind: str, width: int = 64) -> list[Part]:
    """The parts of a discriminator, "dino" or "patch", which is `width` wide; no model directory holds them."""
    with torch.device("meta"):
        if kind == "patch":
            return [Part("PatchGAN", count(PatchDiscriminator(width)), 2)]
        projected = ProjectedDiscriminator(build_vit("dino"), build_vit("dinov2"))
    return [
        Part("discriminator's heads", count(projected.heads), 2),
        Part("DINO ViT-S/16 below them", count(projected.dino)),
        Part("DINOv2 ViT-S/14, their condition", count(projected.dinov2)),
    ]


def regulariser_part(preset: str) -> Part:
    """OSEDiff's second LoRA, which no model directory holds."""
    with torch.device("meta"):
        adapter = OneStepAdapter.for_networks({"unet": build_networks(preset)[1]}, conv_in=False)
    return Part("regulariser, a LoRA of the UNet", count(adapter), 1)


def networks_table(config: TrainConfig) -> Table:
    """The parameters of the networks that a train config has, and which of them it trains."""
    stage = max(1, config.stage)
    parts = parameter_table(config.model.preset, config.model.family, stage)
    table = Table(("part", "parameters", "trained"), f"{config.model.preset}, {config.model.family}: networks")
    for part in parts:
        table.add(part.name, part.parameters, "yes" if part.stage == stage else "")
    table.add("a model directory", _total(parts), "")
    table.add(f"trained by this config (stage {config.stage})", _total(p for p in parts if p.stage == stage), "")
    if config.learns_images:
        critics = critic_parts(config.decoder_loss.discriminator, config.decoder_loss.discriminator_width)
        for part in critics if config.vsd is None else [regulariser_part(config.model.preset)]:
            table.add(part.name, part.parameters, "yes" if part.stage else "")
    return table


def model_tables(preset: str) -> list[Table]:
    """The parameters of CCSR's networks and of the discriminators."""
    parts, published = parameter_table(preset), v1_parts() if preset == "sd21" else []
    table = Table(("part", "parameters", "trained in"), f"{preset}: networks")
    stages = {1: "stages 0, 1", 2: "stage 2", None: ""}
    for part in parts + published:
        table.add(part.name, part.parameters, stages[part.stage])
    table.add("a model directory", _total(parts), "")
    if not published:
        return [table]
    critics = Table(table.columns, "discriminators")
    for version, kind in (("v1", "patch"), ("v2", "dino")):
        for part in critic_parts(kind):
            critics.add(f"{version}: {part.name}", part.parameters, stages[part.stage])
    table.add(f"CCSR v1 as published (paper: {PAPER_MILLIONS} M)", _total(parts + published), "")
    return [table, critics]


def _total(parts: Iterable[Part]) -> int:
    return sum(part.parameters for part in parts)


def _text() -> int:
    """OpenCLIP ViT-H/14's text tower (Ilharco et al., 2021): 24 blocks, width 1024, with its projection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, projection_dim=1024
    )
    with torch.device("meta"):
        return count(CLIPTextModelWithProjection(config))
