"""Published weights in: CCSR v1's checkpoint, v2's directories, Stable Diffusion 2.1-base become model directories."""

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from infra.errors import ModelError
from training.models.ccsr import CcsrModel
from training.models.directory import (
    WEIGHTS,
    check_finite,
    check_keys,
    fill,
    load_part,
    part_from_config,
    read_checkpoint,
    read_json,
    read_weights,
    save_model,
)
from training.models.ldm import unet_names, vae_names
from training.models.networks import CONDITION, UNET_CONFIGS, VAE_CONFIGS, ModelConfig, latent_controlnet
from training.models.text import V2_NEGATIVE_PROMPT, V2_PROMPT, embed_empty_prompt_open_clip, embed_prompts

# What a v1 checkpoint holds beside networks: the noise schedules, a loss's scalar, and stage 2's loss networks.
_NOT_NETWORKS = re.compile(
    r"(betas|alphas_cumprod\w*|posterior_\w+|sqrt_\w+|log_one_minus_alphas_cumprod)(_inter)?|logvar|decoder_loss\..+"
)


def convert_v1(checkpoint: Path | str, base: Path | str | None, out: Path | str) -> None:
    """Write `out` from a published v1 checkpoint (`.ckpt` or `.safetensors`); strict, all or nothing.

    `base`: a Stable Diffusion 2.1-base directory in diffusers' layout, or a model directory. Its configs give the
    architecture, and its text encoder or cached prompts the empty prompt's embedding; with None the architecture is
    SD 2.1-base's and the text tower the checkpoint's own. Every tensor must have a place: UNet, ControlNet (whose first
    convolution over concat([x_t, z_lr]) is split in two), VAE, and the condition encoder, which is dropped where it is
    the VAE's own, as in the published files, and kept where it differs; schedules and losses are dropped.
    Raises ModelError naming the first difference.
    """
    path, base = Path(checkpoint), None if base is None else Path(base)
    state = read_checkpoint(path)
    if not any(key.startswith("control_model.") for key in state):
        raise ModelError(
            f"not a CCSR v1 checkpoint: no control_model.* among its {len(state)} tensors (first: {min(state)})",
            where=str(path),
            todo="give the published v1 .ckpt; for v2's directories use the v2 conversion",
        )
    unet, vae = _architecture(base)
    with torch.device("meta"):
        controlnet = latent_controlnet(unet)
    taken: set[str] = set()

    def take(network: nn.Module, names: Mapping[str, str], prefix: str) -> None:
        expected = network.state_dict()
        needed = {prefix + source: expected[key] for key, source in names.items()}
        found = {}
        for source, tensor in needed.items():
            if source in state:
                value = state[source]
                # 1x1 convolutions of the VAE's attention are linear layers in diffusers.
                found[source] = value[..., 0, 0] if value.dim() == 4 and tensor.dim() == 2 else value
        check_keys(needed, found, path)
        taken.update(needed)
        fill(network, {key: found[prefix + source] for key, source in names.items()}, path)

    _split_first_convolution(state, unet.config.in_channels, path)
    depth = unet.config.layers_per_block
    names = unet_names({key: value for key, value in controlnet.state_dict().items() if CONDITION not in key}, depth)
    names |= {f"{CONDITION}.{leaf}": f"{CONDITION}.{leaf}" for leaf in ("weight", "bias")}
    take(controlnet, names, "control_model.")
    take(unet, unet_names(unet.state_dict(), depth), "model.diffusion_model.")
    take(vae, vae_names(vae.state_dict(), len(vae.config.block_out_channels)), "first_stage_model.")
    condition_encoder = _condition_encoder(vae, state, path)
    taken |= {key for key in state if key.startswith("cond_encoder.")}
    _check_surplus(set(state) - taken, path)

    prefix = "cond_stage_model.model."
    tower = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    if base is not None:
        prompts = embed_prompts(base, [""])
    elif tower:
        prompts = {"": embed_empty_prompt_open_clip(tower, path)}
    else:
        raise ModelError(
            "the checkpoint holds no text tower, so the empty prompt's embedding cannot be computed",
            where=str(path),
            todo="give a Stable Diffusion 2.1-base directory as base: ccsr weights fetch sd21-base",
        )
    _write(unet, vae, controlnet, prompts, "v1", out, path, condition_encoder)


def convert_v2(controlnet_dir: Path | str, vae_dir: Path | str, base_dir: Path | str, out: Path | str) -> None:
    """Write `out` from v2's published directories and SD 2.1-base (UNet, text); strict, all or nothing.

    `controlnet_dir` and `vae_dir` hold the network, or a folder `controlnet` / `vae` that does. The prompts that v2
    uses by default under guidance are cached beside the empty one. Raises ModelError naming the first difference.
    """
    base = Path(base_dir)
    place = _subfolder(Path(controlnet_dir), "controlnet")
    config = read_json(place / "config.json")
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
    _check_prediction_type(base)
    prompts = embed_prompts(base, ["", V2_PROMPT, V2_NEGATIVE_PROMPT])
    _write(unet, vae, controlnet, prompts, "v2", out, place)


def convert_base(base_dir: Path | str, family: str, out: Path | str) -> None:
    """Write `out` from SD 2.1-base alone: a start for training, its ControlNet the UNet's copy that changes nothing.

    `family`: "v1" or "v2". Strict, all or nothing; raises ModelError naming the first difference.
    """
    base = Path(base_dir)
    _check_prediction_type(base)
    unet, vae = load_part(base / "unet", "unet"), load_part(base / "vae", "vae")
    prompts = embed_prompts(base, ["", V2_PROMPT, V2_NEGATIVE_PROMPT])
    _write(unet, vae, latent_controlnet(unet), prompts, family, out, base)


def _architecture(base: Path | None) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    if base is None:
        with torch.device("meta"):
            return UNet2DConditionModel(**UNET_CONFIGS["sd21"]), AutoencoderKL(**VAE_CONFIGS["sd21"])
    _check_prediction_type(base)
    places = {name: base / name / "config.json" for name in ("unet", "vae")}
    unet, vae = (part_from_config(read_json(place), name, place) for name, place in places.items())
    return unet, vae


def _check_prediction_type(base: Path) -> None:
    """SD 2.1 comes in two kinds of the same shape; CCSR stands on `base`, the 512 px model that predicts the noise."""
    place = base / "scheduler" / "scheduler_config.json"
    if place.is_file() and read_json(place).get("prediction_type", "epsilon") != "epsilon":
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
    check_keys(originals, copies, path)
    if all(torch.equal(originals[name], value) for name, value in copies.items()):
        return None
    check_finite(copies, path)
    tensors = vae.state_dict()
    own = {key: copies[name].reshape(tensors[key].shape) for name, key in places.items()}
    return fill(copy.deepcopy(vae), tensors | own, path)


def _check_surplus(left: Iterable[str], path: Path) -> None:
    surplus = sorted(key for key in left if not (_NOT_NETWORKS.fullmatch(key) or key.startswith("cond_stage_model.")))
    if surplus:
        raise ModelError(
            f"tensor {surplus[0]} has no place in CCSR v1 ({len(surplus)} such)",
            where=str(path),
            todo="give the published v1 checkpoint; another family's cannot be converted",
        )


def _subfolder(directory: Path, name: str) -> Path:
    return directory / name if (directory / name).is_dir() else directory


def _write(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    controlnet: nn.Module,
    prompts: dict[str, Tensor],
    family: str,
    out: Path | str,
    source: Path,
    condition_encoder: AutoencoderKL | None = None,
) -> None:
    shared = {key: tensor for key, tensor in unet.state_dict().items() if key in controlnet.state_dict()}
    check_keys(shared, {key: controlnet.state_dict()[key] for key in shared}, source)
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
    presets = [
        name
        for name in UNET_CONFIGS
        if _is_preset(unet.config, UNET_CONFIGS[name]) and _is_preset(vae.config, VAE_CONFIGS[name])
    ]
    config = ModelConfig.model_validate({"preset": presets[0] if presets else "custom", "family": family})
    save_model(CcsrModel(config, vae, unet, controlnet, prompts, condition_encoder), out)


def _is_preset(config: Mapping[str, Any], preset: Mapping[str, Any]) -> bool:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return all(plain(config[key]) == plain(value) for key, value in preset.items() if key != "sample_size")
