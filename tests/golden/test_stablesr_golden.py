"""StableSR's networks against numbers recorded from the published code, through the conversion of its checkpoints.

Weights that are not recorded follow the recording's rule from the official key, so the key set is part of the test.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from infra import ModelError
from training.config import ModelConfig
from training.convert import convert_stablesr
from training.convert.ldm import encoder_names, sft_names, unet_names, vae_names, wrapping_names
from training.models import (
    FeatureWrapping,
    StableSrAdapter,
    StableSrModel,
    load_model,
    save_model,
)
from training.models.library import AutoencoderKL, UNet2DConditionModel
from training.models.networks import seeded_init
from training.models.stablesr import Sft

DATA = Path(__file__).parent / "data" / "stablesr"
UNET = {
    "block_out_channels": (32, 64, 128, 128),
    "attention_head_dim": (2, 4, 8, 8),
    "cross_attention_dim": 24,
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": (32,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
ENCODER, MAIN = "structcond_stage_model.", "model.diffusion_model."
FUSION = "decoder.fusion_layer_1.encode_enc_"


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(DATA / "c_spade.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def by_rule(name: str, shape: tuple[int, ...]) -> Tensor:
    """The recording's weights of the parameter with official key `name`."""
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    vector = 1 + 0.1 * r if name.endswith("weight") else 0.1 * r
    r = vector if len(shape) <= 1 else r / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(r.astype(np.float32))


def official_shapes(names: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """{official key: shape}; attention's q, k and v are one 1x1 convolution over one dimension there."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, name in names.items():
        shape = tuple(state[key].shape)
        if name.endswith(("to_k.weight", "to_k.bias", "to_v.weight", "to_v.bias")) and "attn" not in name:
            continue
        if "to_q." in name and "attn" not in name:
            name, shape = name.replace("to_q", "qkv"), (3 * shape[0], *shape[1:])
        if (".qkv.weight" in name or ".1.proj_out.weight" in name) and "encoder" not in name and len(shape) == 2:
            shape = (*shape, 1)
        shapes[name] = shape
    return shapes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of the recording's architecture with other weights; its prompt is of 5 tokens."""
    with seeded_init(1):
        vae, unet = AutoencoderKL(**VAE), UNet2DConditionModel(**UNET)
        adapter = StableSrAdapter.for_unet(unet, width=32)
    config = ModelConfig(preset="custom", family="stablesr")
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(StableSrModel(config, vae, unet, adapter, {"": torch.zeros(1, 5, 24)}), folder)
    return folder


@pytest.fixture(scope="module")
def state(base: Path, recorded: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The stage-1 checkpoint: exactly the recorded key sets, a random VAE, and what else a real one holds."""
    model = load_model(base)
    encoder, unet = model.adapter.encoder.state_dict(), model.unet.state_dict()
    shapes = official_shapes(encoder_names(encoder, 2), encoder)
    assert shapes.keys() == set(recorded["enc_keys"].tolist())
    found = {ENCODER + name: by_rule(name, shape) for name, shape in shapes.items()}
    sft = model.adapter.sft.state_dict()
    shapes = {name: tuple(unet[key].shape) for key, name in unet_names(unet, 2).items()}
    shapes |= {name: tuple(sft[key].shape) for key, name in sft_names(model.adapter.levels, 2).items()}
    assert shapes.keys() == set(recorded["unet_keys"].tolist())
    found |= {MAIN + name: by_rule(name, shape) for name, shape in shapes.items()}
    vae = model.vae.state_dict()
    found |= {f"first_stage_model.{name}": as_theirs(name, vae[key]) for key, name in vae_names(vae, 4).items()}
    others = ("betas", "alphas_cumprod_prev", "posterior_mean_coef1", "logvar", "cond_stage_model.model.ln_final.bias")
    return found | {name: torch.zeros(2) for name in others}


def as_theirs(name: str, value: Tensor) -> Tensor:
    """The VAE's attention layers are 1x1 convolutions there."""
    return value[..., None, None] if ".attn_1." in name and value.dim() == 2 else value


@pytest.fixture(scope="module")
def wrapping_state(base: Path) -> dict[str, Tensor]:
    """The feature wrapping's checkpoint: the same VAE, fusions by the recording's rule, a loss."""
    vae = load_model(base).vae.state_dict()
    found = {name: as_theirs(name, vae[key]) for key, name in vae_names(vae, 4).items()}
    with torch.device("meta"):
        fusions = FeatureWrapping((32,) * 4).state_dict()
    names = wrapping_names(fusions)
    assert len(names) == 156
    found |= {f"decoder.{name}": by_rule(f"decoder.{name}", tuple(fusions[key].shape)) for key, name in names.items()}
    return found | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(2)}


def write(state: dict[str, Tensor], path: Path) -> Path:
    torch.save({"state_dict": state, "epoch": 117}, path)
    return path


@pytest.fixture(scope="module")
def converted(
    state: dict[str, Tensor], wrapping_state: dict[str, Tensor], base: Path, tmp_path_factory: pytest.TempPathFactory
) -> StableSrModel:
    folder = tmp_path_factory.mktemp("converted")
    checkpoints = write(state, folder / "stablesr.ckpt"), write(wrapping_state, folder / "wrapping.ckpt")
    convert_stablesr(*checkpoints, base, folder / "model")
    model = load_model(folder / "model")
    assert isinstance(model, StableSrModel)
    return model


@torch.no_grad()
def test_modulation(recorded: dict[str, np.ndarray]) -> None:
    sft = Sft(64, 32, 128)
    pieces = {"norm": "param_free_norm", "shared": "mlp_shared.0", "scale": "mlp_gamma", "shift": "mlp_beta"}
    sft.load_state_dict(
        {f"{p}.{n}": tensor(recorded[f"spade_w/{s}.{n}"]) for p, s in pieces.items() for n in ("weight", "bias")}
    )
    found = sft(tensor(recorded["spade_x"]), tensor(recorded["spade_c"]))
    assert relative(found, tensor(recorded["spade_y"])) < 1e-5


@torch.no_grad()
def test_encoder_gives_the_recorded_features(converted: StableSrModel, recorded: dict[str, np.ndarray]) -> None:
    features = converted.adapter(tensor(recorded["enc_x"]), tensor(recorded["enc_t"]))
    assert len(features) == 4
    for feature, width in zip(features, (24, 12, 6, 3), strict=True):
        assert relative(feature, tensor(recorded[f"enc_feat_{width}"])) < 1e-5


@torch.no_grad()
def test_modulated_unet_gives_the_recorded_noise(converted: StableSrModel, recorded: dict[str, np.ndarray]) -> None:
    x, t, text = (tensor(recorded[name]) for name in ("unet_x", "enc_t", "unet_ctx"))
    features = [tensor(recorded[f"enc_feat_{width}"]) for width in (24, 12, 6, 3)]
    with converted.adapter.attached(converted.unet, features):
        found = converted.unet(x, t, text).sample
    expected = tensor(recorded["unet_y"])
    assert relative(found, expected) < 1e-5
    assert relative(converted.unet(x, t, text).sample, expected) > 0.1
    whole = converted.denoiser(tensor(recorded["enc_x"]), text)(x, t)
    assert relative(whole, expected) < 1e-5


def their_block(x: Tensor, state: dict[str, Tensor], prefix: str) -> Tensor:
    """The residual block of the published autoencoder, from its tensors."""
    h = x
    for number in "12":
        h = F.group_norm(h, 32, state[f"{prefix}norm{number}.weight"], state[f"{prefix}norm{number}.bias"], 1e-6)
        h = F.conv2d(F.silu(h), state[f"{prefix}conv{number}.weight"], state[f"{prefix}conv{number}.bias"], padding=1)
    if f"{prefix}conv_out.weight" in state:
        x = F.conv2d(x, state[f"{prefix}conv_out.weight"], state[f"{prefix}conv_out.bias"])
    return x + h


@torch.no_grad()
def test_fusion_is_the_specified_formula(converted: StableSrModel, wrapping_state: dict[str, Tensor]) -> None:
    """Computed from the official tensors: Res(2C -> C), two RRDBs, Res(C -> C), dec + w r."""
    state = {key.removeprefix(FUSION): v for key, v in wrapping_state.items() if key.startswith(FUSION)}
    enc, dec = torch.randn(2, 1, 32, 8, 12, generator=torch.Generator().manual_seed(0))
    x = their_block(torch.cat([enc, dec], dim=1), state, "1.")
    for block in range(2):
        entered = x
        for dense in range(1, 4):
            seen, before = x, x
            for conv in range(1, 6):
                place = f"2.{block}.rdb{dense}.conv{conv}."
                out = F.conv2d(seen, state[f"{place}weight"], state[f"{place}bias"], padding=1)
                seen = torch.cat([seen, F.leaky_relu(out, 0.2)], dim=1)
            x = before + 0.2 * out
        x = entered + 0.2 * x
    expected = dec + 0.3 * their_block(x, state, "3.")
    assert relative(converted.wrapping.fusions["1"](enc, dec, 0.3), expected) < 1e-6


@torch.no_grad()
def test_wrapping_of_weight_zero_is_the_plain_decoder_and_of_one_is_not(converted: StableSrModel) -> None:
    generator = torch.Generator().manual_seed(1)
    z, lr = torch.randn(2, 4, 8, 8, generator=generator), torch.rand(2, 3, 64, 64, generator=generator)
    plain = converted.decode(z)
    assert torch.equal(converted.decode(z, lr, 0), plain)
    half, full = (converted.decode(z, lr, weight) for weight in (0.5, 1.0))
    assert relative(half, plain) > 0.01
    assert relative(full, half) > 0.01
    # The hooks of both levels, in the order of the decoder: the coarser level is fused first.
    with converted.wrapping.attached(converted.vae, converted.wrapping.features(converted.vae, 2 * lr - 1), 0.0):
        assert torch.equal(converted.decode(z), plain)
    assert not any(module._forward_hooks for module in converted.vae.modules())


def test_conversion_keeps_every_tensor(
    converted: StableSrModel, state: dict[str, Tensor], wrapping_state: dict[str, Tensor]
) -> None:
    """Back to the official names, each tensor is the file's, to the bit."""
    encoder = converted.adapter.encoder.state_dict()
    names = encoder_names(encoder, 2)
    back = {name: encoder[key] for key, name in names.items() if ".to_" not in name}
    for place in (name.removesuffix("to_q.weight") for name in names.values() if name.endswith("to_q.weight")):
        for leaf in ("weight", "bias"):
            ours = {n: encoder[k] for k, n in names.items() if n.startswith(f"{place}to_") and n.endswith(leaf)}
            heads = [ours[f"{place}to_{part}.{leaf}"].unflatten(0, (4, -1)) for part in "qkv"]
            back[f"{place}qkv.{leaf}"] = torch.stack(heads, dim=1).flatten(0, 2)
    theirs = {key.removeprefix(ENCODER): value for key, value in state.items() if key.startswith(ENCODER)}
    assert back.keys() == theirs.keys()
    assert all(torch.equal(value.flatten(), theirs[name].flatten()) for name, value in back.items())
    sft = converted.adapter.sft.state_dict()
    assert all(torch.equal(sft[key], state[MAIN + n]) for key, n in sft_names(converted.adapter.levels, 2).items())
    fusions = converted.wrapping.state_dict()
    assert all(torch.equal(fusions[key], wrapping_state[f"decoder.{n}"]) for key, n in wrapping_names(fusions).items())
    assert converted.condition_encoder is None


def test_a_wrapping_with_another_vae_keeps_both(
    state: dict[str, Tensor], wrapping_state: dict[str, Tensor], base: Path, tmp_path: Path
) -> None:
    changed = wrapping_state | {"decoder.conv_in.bias": wrapping_state["decoder.conv_in.bias"] + 1}
    convert_stablesr(write(state, tmp_path / "a.ckpt"), write(changed, tmp_path / "b.ckpt"), base, tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert torch.equal(model.vae.decoder.conv_in.bias, changed["decoder.conv_in.bias"])
    assert model.condition_encoder is None  # z_lr does not depend on the decoder
    changed |= {"encoder.conv_in.bias": wrapping_state["encoder.conv_in.bias"] + 1}
    convert_stablesr(write(state, tmp_path / "a.ckpt"), write(changed, tmp_path / "b.ckpt"), base, tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert torch.equal(model.vae.encoder.conv_in.bias, changed["encoder.conv_in.bias"])
    assert torch.equal(model.condition_encoder.encoder.conv_in.bias, wrapping_state["encoder.conv_in.bias"])


DAMAGE = {
    "missing modulation": ("drop", f"{MAIN}middle_block.2.spade.mlp_beta.bias", "mlp_beta.bias is missing"),
    "missing qkv": ("drop", f"{ENCODER}input_blocks.1.1.qkv.weight", "input_blocks.1.1.to_q.weight is missing"),
    "surplus": ("add", f"{ENCODER}fea_tran.4.in_layers.0.weight", "fea_tran.4.in_layers.0.weight has no place"),
    "another family": ("drop", ENCODER, "not a StableSR checkpoint: no structcond_stage_model"),
    "wrapping: missing": ("drop wrapping", f"{FUSION}3.norm1.bias", "encode_enc_3.norm1.bias is missing"),
    "wrapping: surplus": ("add wrapping", "decoder.fusion_layer_3.x", "decoder.fusion_layer_3.x has no place"),
    "wrapping: none": ("drop wrapping", "decoder.fusion_layer", "not a StableSR feature wrapping checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_are_refused_by_their_first_difference(
    name: str, state: dict[str, Tensor], wrapping_state: dict[str, Tensor], base: Path, tmp_path: Path
) -> None:
    how, key, message = DAMAGE[name]
    states = [state, wrapping_state]
    number = int("wrapping" in how)
    changed = {k: v for k, v in states[number].items() if not (how.startswith("drop") and k.startswith(key))}
    states[number] = changed | ({key: torch.zeros(2)} if how.startswith("add") else {})
    files = [write(one, tmp_path / f"{n}.ckpt") for n, one in enumerate(states)]
    with pytest.raises(ModelError, match=message):
        convert_stablesr(*files, base, tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["0.ckpt", "1.ckpt"]


def test_the_directory_says_what_it_is(converted: StableSrModel, tmp_path: Path) -> None:
    save_model(converted, tmp_path / "model")
    record = json.loads((tmp_path / "model" / "ccsr.json").read_text())
    assert record["family"] == "stablesr"
    assert {place.split("/")[0] for place in record["sha256"]} == {
        "adapter",
        "prompt.safetensors",
        "unet",
        "vae",
        "wrapping",
    }
    again = load_model(tmp_path / "model")
    for part, network in converted.networks.items():
        found = again.networks[part].state_dict()
        assert all(torch.equal(value, found[key]) for key, value in network.state_dict().items())
