"""Checkpoints of latent-diffusion's code (CCSR v1, StableSR): from diffusers' names of tensors to theirs."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from infra.errors import ModelError
from training.models.directory import check_keys, fill, read_checkpoint

# What a checkpoint holds beside networks: noise schedules, a loss's scalar, loss networks, the text tower.
_NOT_NETWORKS = re.compile(
    r"(betas|alphas_cumprod\w*|posterior_\w+|sqrt_\w+|log_one_minus_alphas_cumprod)(_inter)?|logvar"
    r"|(decoder_)?loss\..+|cond_stage_model\..+"
)
TEXT = "cond_stage_model.model."
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


class LdmCheckpoint:
    """A checkpoint's tensors by name, taken network by network; nothing may be missing or be left over."""

    def __init__(self, path: Path, must_have: str, kind: str) -> None:
        """ModelError unless some tensor's name starts with `must_have`: the file is then none of `kind`."""
        self.path, self.kind, self.state = path, kind, read_checkpoint(path)
        self.taken: set[str] = set()
        if not any_start(self.state, must_have):
            raise ModelError(
                f"not a {kind} checkpoint: no {must_have}* among its {len(self.state)} tensors "
                f"(first: {min(self.state)})",
                where=str(path),
                todo=f"give the published {kind} checkpoint",
            )

    def check_parts(self, parts: Mapping[str, str]) -> None:
        """ModelError naming all parts (name -> prefix) of which a (pruned, partial) file holds no tensor."""
        missing = [f"{name} ({prefix}*)" for name, prefix in parts.items() if not any_start(self.state, prefix)]
        if missing:
            raise ModelError(
                f"the checkpoint lacks its {', its '.join(missing)}",
                where=str(self.path),
                todo=f"give a complete {self.kind} checkpoint; a base gives sizes and text, not weights",
            )

    def take(self, network: nn.Module, names: Mapping[str, str], prefix: str) -> None:
        """Fill `network` with the tensors that `names` (its key -> theirs, without `prefix`) say. ModelError naming the
        first that is missing or of another shape."""
        expected = network.state_dict()
        needed = {prefix + source: expected[key] for key, source in names.items()}
        found = {}
        for source, tensor in needed.items():
            if source in self.state:
                value = self.state[source]
                # 1x1 convolutions of attention layers are linear layers in diffusers.
                found[source] = value.flatten(1) if value.dim() > tensor.dim() == 2 else value
        check_keys(needed, found, self.path)
        self.taken.update(needed)
        fill(network, {key: found[prefix + source] for key, source in names.items()}, self.path)

    def text_tower(self) -> dict[str, Tensor]:
        """OpenCLIP's tensors by their own names, where there are any."""
        return {key.removeprefix(TEXT): value for key, value in self.state.items() if key.startswith(TEXT)}

    def check_all_taken(self, also: Iterable[str] = ()) -> None:
        """ModelError naming the first tensor that no network took and that is not known to be none of a network."""
        left = set(self.state) - self.taken - set(also)
        surplus = sorted(key for key in left if not _NOT_NETWORKS.fullmatch(key))
        if surplus:
            raise ModelError(
                f"tensor {surplus[0]} has no place in {self.kind} ({len(surplus)} such)",
                where=str(self.path),
                todo=f"give the published {self.kind} checkpoint; another family's cannot be converted",
            )


def any_start(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def unet_names(state: Mapping[str, Any], layers_per_block: int) -> dict[str, str]:
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


def encoder_names(state: Mapping[str, Tensor], layers: int) -> dict[str, str]:
    """{our key: StableSR's key} of the time-aware encoder, its `qkv` split by `split_qkv`."""
    inner = unet_names({key: value for key, value in state.items() if not key.startswith("out_blocks.")}, layers)
    outer = {key: _resnet(key.replace("out_blocks", "fea_tran")) for key in state if key not in inner}
    return {
        key: name.replace(".group_norm.", ".norm.").replace(".to_out.0.", ".proj_out.")
        for key, name in (inner | outer).items()
    }


def split_qkv(state: Mapping[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Tensors with `qkv` as to_q, to_k and to_v; its rows are (head, q | k | v, channel of the head)."""
    split = {}
    for key, value in state.items():
        if ".qkv." not in key or len(value) % (3 * num_heads):
            split[key] = value
            continue
        parts = value.unflatten(0, (num_heads, 3, -1)).unbind(1)
        split |= {key.replace("qkv", f"to_{n}"): part.flatten(0, 1) for n, part in zip("qkv", parts, strict=True)}
    return split


def sft_names(places: Iterable[str], layers: int) -> dict[str, str]:
    """{our key: StableSR's key} of the modulations of a UNet's residual blocks at `places` (diffusers' names)."""
    last = unet_names({f"{place}.conv2.weight": None for place in places}, layers)
    pieces = {"norm": "param_free_norm", "shared": "mlp_shared.0", "scale": "mlp_gamma", "shift": "mlp_beta"}
    return {
        f"{key.removesuffix('.conv2.weight').replace('.', '-')}.{piece}.{leaf}": name.replace(
            "out_layers.3.weight", f"spade.{source}.{leaf}"
        )
        for key, name in last.items()
        for piece, source in pieces.items()
        for leaf in ("weight", "bias")
    }


def wrapping_names(state: Iterable[str]) -> dict[str, str]:
    """{our key: StableSR's key} of the controllable feature wrapping."""

    def name(key: str) -> str:
        key = re.sub(r"fusions\.(\d+)\.", r"fusion_layer_\1.", key)
        key = key.replace("enter.", "encode_enc_1.").replace("leave.", "encode_enc_3.")
        key = key.replace("conv_shortcut", "conv_out")
        match = re.fullmatch(r"(.+)\.dense\.(\d+)\.(\d+)\.convs\.(\d+)\.(\w+)", key)
        if not match:
            return key
        level, block, dense, conv, leaf = match.groups()
        return f"{level}.encode_enc_2.{block}.rdb{int(dense) + 1}.conv{int(conv) + 1}.{leaf}"

    return {key: name(key) for key in state}


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
