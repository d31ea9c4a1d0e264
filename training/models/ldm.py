"""Where CCSR v1's checkpoint keeps each tensor: from diffusers' names to those of latent-diffusion's code."""

import re
from collections.abc import Mapping

from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_mid_block": "middle_block_out.0",
}
_VAE_PIECES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}


def unet_names(state: Mapping[str, Tensor], layers_per_block: int) -> dict[str, str]:
    """{diffusers key: latent-diffusion key} of a UNet or ControlNet, without the checkpoint's prefix.

    Input block 0 is conv_in; then every level has `layers_per_block` residual blocks and a downsampler, the last none.
    Levels of the decoder have one block more, and the upsampler follows the last block's attention where it has one.
    """

    def name(key: str) -> str:
        for end, source in _UNET_ENDS.items():
            if key.startswith(end + "."):
                return _resnet(source + key[len(end) :])
        match = re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(.+)", key)
        if match:
            return f"zero_convs.{match[1]}.0.{match[2]}"
        match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", key)
        if not match:
            raise ValueError(f"no latent-diffusion name is known for {key}")
        side, level, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        first = level * (layers_per_block + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers_per_block + 1}.0.op{rest.removeprefix('conv')}"
        if kind == "upsamplers":
            place = 2 if f"up_blocks.{level}.attentions.0.norm.weight" in state else 1
            return f"output_blocks.{first + layers_per_block}.{place}.{rest}"
        block = f"input_blocks.{first + layer + 1}" if side == "down" else f"output_blocks.{first + layer}"
        return _resnet(f"{block}.0.{rest}") if kind == "resnets" else f"{block}.1.{rest}"

    return {key: name(key) for key in state}


def _resnet(name: str) -> str:
    """Translate the layer of a residual block; attention layers share no name with these and stay."""
    if ".transformer_blocks." in name:
        return name
    head, layer, leaf = name.rsplit(".", 2)
    return f"{head}.{_RESNET.get(layer, layer)}.{leaf}"


def vae_names(state: Mapping[str, Tensor], num_levels: int) -> dict[str, str]:
    """{diffusers key: latent-diffusion key} of an AutoencoderKL; the decoder counts its levels from the other end."""

    def name(key: str) -> str:
        key = re.sub(r"(down|up)samplers\.0", r"\1sample", key)
        key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d+)", r"down.\1", key)
        key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{num_levels - 1 - int(match[1])}", key)
        key = key.replace(".resnets.", ".block.") if ".up." in key else key
        for piece, source in _VAE_PIECES.items():
            key = re.sub(rf"(?<![\w.]){re.escape(piece)}\.|(?<=\.){re.escape(piece)}\.", f"{source}.", key)
        return key

    return {key: name(key) for key in state}


def open_clip_names(num_layers: int) -> dict[str, str]:
    """{transformers CLIPTextModel key: OpenCLIP key} of the first `num_layers` blocks; there q, k, v are one tensor."""
    names = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
    }
    pieces = {
        "layer_norm1": "ln_1",
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for leaf in ("weight", "bias"):
        names[f"final_layer_norm.{leaf}"] = f"ln_final.{leaf}"
        for layer in range(num_layers):
            here, there = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
            names |= {f"{here}.{piece}.{leaf}": f"{there}.{source}.{leaf}" for piece, source in pieces.items()}
            for part in "qkv":
                names[f"{here}.self_attn.{part}_proj.{leaf}"] = f"{there}.attn.in_proj_{leaf}"
    return names
