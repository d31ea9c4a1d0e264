"""Published weights in: CCSR v1, v2, StableSR and Stable Diffusion 2.1-base become model directories."""

import copy
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import ModelError
from training.config import ModelConfig
from training.convert.ldm import (
    LdmCheckpoint,
    encoder_names,
    sft_names,
    split_qkv,
    unet_names,
    vae_names,
    wrapping_names,
)
from training.convert.text import embed_empty_prompt_open_clip, embed_prompts
from training.models.build import MODELS
from training.models.directory import (
    WEIGHTS,
    check_finite,
    check_keys,
    fill,
    load_part,
    part_from_config,
    read_part_json,
    read_weights,
    save_model,
)
from training.models.library import AutoencoderKL, UNet2DConditionModel
from training.models.networks import (
    CONDITION,
    UNET_CONFIGS,
    VAE_CONFIGS,
    latent_controlnet,
    seeded_init,
)
from training.models.stablesr import StableSrAdapter
from training.models.wrapping import FeatureWrapping

_UNET = "model.diffusion_model."


def convert_v1(checkpoint: Path | str, base: Path | str | None, out: Path | str) -> None:
    """Write `out` from a v1 checkpoint (`.ckpt` or `.safetensors`, also in half precision); strict, all or nothing.

    `base`: a Stable Diffusion 2.1-base directory in diffusers' layout, or a model directory. Its configs give the
    architecture, and its text encoder or cached prompts the empty prompt's embedding; with None the architecture is
    SD 2.1-base's and the text tower the checkpoint's own. Every tensor must have a place: UNet, ControlNet (whose first
    convolution over concat([x_t, z_lr]) is split in two), VAE, and the condition encoder, which is kept where it is not
    the VAE's own, as it is in the published files (pruned safetensors may lack it); schedules and losses are dropped.
    Raises ModelError naming the first difference.
    """
    path, base = Path(checkpoint), None if base is None else Path(base)
    source = LdmCheckpoint(path, "control_model.", "CCSR v1")
    source.check_parts({"UNet": _UNET, "VAE": "first_stage_model."})
    unet, vae = _architecture(base)
    with torch.device("meta"):
        controlnet = latent_controlnet(unet)
    _split_first_convolution(source.state, unet.config.in_channels, path)
    depth = unet.config.layers_per_block
    names = unet_names({key: value for key, value in controlnet.state_dict().items() if CONDITION not in key}, depth)
    names |= {f"{CONDITION}.{leaf}": f"{CONDITION}.{leaf}" for leaf in ("weight", "bias")}
    source.take(controlnet, names, "control_model.")
    _take_base(source, unet, vae)
    condition_encoder = _condition_encoder(vae, source.state, path)
    source.check_all_taken(also=[key for key in source.state if key.startswith("cond_encoder.")])
    prompts = _empty_prompt(base, source)
    write_model(unet, vae, controlnet, prompts, "v1", out, path, condition_encoder=condition_encoder)


def convert_stablesr(
    checkpoint: Path | str, wrapping: Path | str | None, base: Path | str | None, out: Path | str
) -> None:
    """Write `out` from StableSR's published checkpoint, and the one of its feature wrapping; strict, all or nothing.

    `base` as in `convert_v1`; the sizes of encoder and wrapping are read off the tensors. Every tensor must have a
    place. The wrapping's file has its own VAE, which becomes the model's; the checkpoint's is kept as the
    condition encoder where their encoders differ. Raises ModelError naming the first difference.
    """
    path, base = Path(checkpoint), None if base is None else Path(base)
    source = LdmCheckpoint(path, "structcond_stage_model.", "StableSR")
    unet, vae = _architecture(base)
    prefix = "structcond_stage_model."
    width, hidden = (
        len(source.state.get(key, ()))
        for key in (f"{prefix}input_blocks.0.0.weight", f"{_UNET}middle_block.0.spade.mlp_shared.0.bias")
    )
    with torch.device("meta"):
        adapter = StableSrAdapter.for_unet(unet, width=width or 256, hidden=hidden or 128)
    source.state = split_qkv(source.state, adapter.config.num_heads)
    encoder = adapter.encoder
    source.take(encoder, encoder_names(encoder.state_dict(), adapter.config.encoder_layers), prefix)
    source.take(adapter.sft, sft_names(adapter.levels, unet.config.layers_per_block), _UNET)
    _take_base(source, unet, vae)
    source.check_all_taken()
    others: dict[str, Any] = {}
    if wrapping is not None:
        first_stage = vae
        vae, others["wrapping"] = _wrapping(Path(wrapping), first_stage)
        encoders = (first_stage.encoder, vae.encoder), (first_stage.quant_conv, vae.quant_conv)
        pairs = (zip(a.state_dict().values(), b.state_dict().values(), strict=True) for a, b in encoders)
        if not all(torch.equal(a, b) for tensors in pairs for a, b in tensors):
            others["condition_encoder"] = first_stage
    write_model(unet, vae, adapter, _empty_prompt(base, source), "stablesr", out, path, **others)


def _wrapping(path: Path, vae: AutoencoderKL) -> tuple[AutoencoderKL, FeatureWrapping]:
    """The VAE, of the architecture of `vae`, and the wrapping of a feature wrapping's checkpoint."""
    source = LdmCheckpoint(path, "decoder.fusion_layer_", "StableSR feature wrapping")
    growth = len(source.state.get("decoder.fusion_layer_1.encode_enc_2.0.rdb1.conv1.bias", ())) or 32
    channels, groups = tuple(vae.config.block_out_channels), vae.config.norm_num_groups
    with torch.device("meta"):
        wrapping, own = FeatureWrapping(channels, growth, groups), AutoencoderKL.from_config(vae.config)
    source.take(wrapping, wrapping_names(wrapping.state_dict()), "decoder.")
    source.take(own, vae_names(own.state_dict(), len(channels)), "")
    source.check_all_taken()
    return own, wrapping


def _take_base(source: LdmCheckpoint, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    source.take(unet, unet_names(unet.state_dict(), unet.config.layers_per_block), _UNET)
    source.take(vae, vae_names(vae.state_dict(), len(vae.config.block_out_channels)), "first_stage_model.")


def _empty_prompt(base: Path | None, source: LdmCheckpoint) -> dict[str, Tensor]:
    """The prompts to cache: by the base's text encoder, or by the text tower in the checkpoint."""
    if base is not None:
        return embed_prompts(base, [""])
    tower = source.text_tower()
    if not tower:
        raise ModelError(
            "the checkpoint holds no text tower, so the empty prompt's embedding cannot be computed",
            where=str(source.path),
            todo="give a Stable Diffusion 2.1-base directory as base: ccsr weights fetch sd21-base",
        )
    return {"": embed_empty_prompt_open_clip(tower, source.path)}


def convert_v2(controlnet_dir: Path | str, vae_dir: Path | str, base_dir: Path | str, out: Path | str) -> None:
    """Write `out` from v2's published directories and SD 2.1-base (UNet, text); strict, all or nothing.

    `controlnet_dir` and `vae_dir` hold the network, or a folder `controlnet` / `vae` that does. The prompts that v2
    uses by default under guidance are cached beside the empty one. Raises ModelError naming the first difference.
    """
    base = Path(base_dir)
    place = _subfolder(Path(controlnet_dir), "controlnet")
    config = read_part_json(place / "config.json")
    if not config.get("use_vae_encode_condition"):
        raise ModelError(
            "this ControlNet takes an RGB image, not the LR latent (use_vae_encode_condition is not set)",
            where=str(place / "config.json"),
            todo="give CCSR v2's controlnet directory",
        )
    config = {key: value for key, value in config.items() if key != "use_vae_encode_condition"}
    config |= {"conditioning_channels": config.get("in_channels", 4), "conditioning_embedding_out_channels": [16]}
    controlnet = part_from_config(config, "controlnet", where=place / "config.json")
    renamed = {
        key.replace("condition_conv_in.", f"{CONDITION}."): tensor
        for key, tensor in read_weights(place / WEIGHTS).items()
    }
    fill(controlnet, renamed, where=place / WEIGHTS)
    vae = load_part(_subfolder(Path(vae_dir), "vae"), "vae")
    unet = load_part(base / "unet", "unet")
    check_prediction_type(base)
    prompts = embed_prompts(base, MODELS["v2"].cached_prompts)
    write_model(unet, vae, controlnet, prompts, "v2", out, place)


def convert_base(base_dir: Path | str, family: str, out: Path | str) -> None:
    """Write `out` from SD 2.1-base alone: a start for training. A ControlNet is the UNet's copy that changes nothing,
    and so are LoRAs; StableSR's adapter has random weights, always the same.

    `family`: of `ModelConfig`. `base_dir` may be a model directory too, whose prediction is kept. Strict, all
    or nothing; raises ModelError naming the first difference.
    """
    base = Path(base_dir)
    check_prediction_type(base)
    unet, vae = load_part(base / "unet", "unet"), load_part(base / "vae", "vae")
    prompts = embed_prompts(base, MODELS[family].cached_prompts)
    with seeded_init(0):
        adapter = MODELS[family].fresh_adapter(unet, vae, _config(unet, vae, family, base).preset)
    write_model(unet, vae, adapter, prompts, family, out, base)


def _architecture(base: Path | None) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    if base is None:
        with torch.device("meta"):
            return UNet2DConditionModel(**UNET_CONFIGS["sd21"]), AutoencoderKL(**VAE_CONFIGS["sd21"])
    check_prediction_type(base)
    places = {name: base / name / "config.json" for name in ("unet", "vae")}
    unet, vae = (part_from_config(read_part_json(place), name, place) for name, place in places.items())
    return unet, vae


def check_prediction_type(base: Path) -> None:
    """SD 2.1 comes in two kinds of the same shape; CCSR uses `base`, the 512 px model that predicts the noise."""
    place = base / "scheduler" / "scheduler_config.json"
    if place.is_file() and read_part_json(place).get("prediction_type", "epsilon") != "epsilon":
        raise ModelError(
            "this base predicts v, not the noise: it is Stable Diffusion 2.1 at 768 px, not 2.1-base",
            where=str(place),
            todo="ccsr weights fetch sd21-base",
        )


def _split_first_convolution(state: dict[str, Tensor], channels: int, path: Path) -> None:
    """conv(concat([x_t, z_lr])) = conv_in(x_t) + condition(z_lr): cut the weight in two; the bias goes to conv_in."""
    first = "control_model.input_blocks.0.0.weight"
    if first not in state:
        return  # check_keys names it
    weight = state[first]
    if weight.dim() != 4 or weight.shape[1] != 2 * channels:
        raise ModelError(
            f"tensor {first} has shape {tuple(weight.shape)}, not (*, {2 * channels}, 3, 3)",
            where=str(path),
            todo="this ControlNet does not take the LR latent beside x_t; give the published CCSR v1 checkpoint",
        )
    state[first] = weight[:, :channels]
    state[f"control_model.{CONDITION}.weight"] = weight[:, channels:]
    state[f"control_model.{CONDITION}.bias"] = torch.zeros(len(weight), dtype=weight.dtype)


def _condition_encoder(vae: AutoencoderKL, state: Mapping[str, Tensor], path: Path) -> AutoencoderKL | None:
    """cond_encoder as an autoencoder beside the VAE, whose decoder it shares; None where it is the VAE's encoder."""
    sources = vae_names(vae.state_dict(), len(vae.config.block_out_channels))
    places = {f"cond_encoder.{source}": key for key, source in sources.items() if re.match(r"(quant_conv|enc)", source)}
    originals = {name: state[name.replace("cond_encoder.", "first_stage_model.")] for name in places}
    copies = {name: value for name, value in state.items() if name.startswith("cond_encoder.")}
    if not copies and path.suffix == ".safetensors":  # people share pruned ones; of the published .ckpt it is damage
        print(f"note: no cond_encoder.* in {path.name}: the VAE's own encoder takes its place", file=sys.stderr)
        return None
    check_keys(originals, copies, path)
    if all(torch.equal(originals[name], value) for name, value in copies.items()):
        return None
    check_finite(copies, path)
    tensors = vae.state_dict()
    own = {key: copies[name].reshape(tensors[key].shape) for name, key in places.items()}
    return fill(copy.deepcopy(vae), tensors | own, path)


def _subfolder(directory: Path, name: str) -> Path:
    return directory / name if (directory / name).is_dir() else directory


def write_model(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    adapter: nn.Module,
    prompts: dict[str, Tensor],
    family: str,
    out: Path | str,
    source: Path,
    **others: Any,
) -> None:
    """Write a model directory of parts that must fit each other; `source`: the place that errors name."""
    adapted = adapter.state_dict()
    shared = {key: tensor for key, tensor in unet.state_dict().items() if key in adapted}
    check_keys(shared, {key: adapted[key] for key in shared}, source)
    widths = {
        "the VAE's latents": (vae.config.latent_channels, unet.config.in_channels),
        "the prompt's embedding": (prompts[""].shape[-1], unet.config.cross_attention_dim),
    }
    for name, (found, expected) in widths.items():
        if found != expected:
            raise ModelError(
                f"{name} have {found} channels, the UNet takes {expected}",
                where=str(source),
                todo="give parts that belong together",
            )
    config = _config(unet, vae, family, source)
    save_model(MODELS[family](config, vae, unet, adapter, prompts, **others), out)


def _config(unet: UNet2DConditionModel, vae: AutoencoderKL, family: str, base: Path) -> ModelConfig:
    presets = [
        name
        for name in UNET_CONFIGS
        if _is_preset(unet.config, UNET_CONFIGS[name]) and _is_preset(vae.config, VAE_CONFIGS[name])
    ]
    record = base / "ccsr.json"
    prediction = read_part_json(record)["prediction"] if record.is_file() else "eps"
    return ModelConfig.model_validate(
        {"preset": presets[0] if presets else "custom", "family": family, "prediction": prediction}
    )


def _is_preset(config: Mapping[str, Any], preset: Mapping[str, Any]) -> bool:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return all(plain(config[key]) == plain(value) for key, value in preset.items() if key != "sample_size")
