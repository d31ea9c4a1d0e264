"""Conversion of published weights: numbers of the recorded tiny checkpoint, strict accounting, nothing on failure."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from recordings import recordings
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from infra import ModelError
from tests.small_networks import save_text_tower
from training.config import ModelConfig
from training.convert import convert_v1, convert_v2
from training.convert.ldm import unet_names, vae_names
from training.convert.text import embed_empty_prompt_open_clip
from training.models import CcsrModel, load_model
from training.models.ccsr import V2_NEGATIVE_PROMPT, V2_PROMPT
from training.models.directory import WEIGHTS
from training.models.library import AutoencoderKL, UNet2DConditionModel
from training.models.networks import UNET_CONFIGS, VAE_CONFIGS, latent_controlnet, seeded_init

DATA = Path(__file__).parent / "data" / "models"
UNET = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 16,
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": (32,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
CONDITION = "control_model.controlnet_cond_embedding."
FIRST = "control_model.input_blocks.0.0.weight"


def recorded(name: str) -> dict[str, Tensor]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].dtype.kind in "fi"}


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def networks() -> tuple[UNet2DConditionModel, nn.Module]:
    """A random UNet and ControlNet of the recording's architecture, no weight zero."""
    with seeded_init(1):
        unet = UNet2DConditionModel(**UNET)
        controlnet = latent_controlnet(unet)
        for parameter in controlnet.parameters():
            nn.init.normal_(parameter, std=0.1)
    return unet, controlnet


@pytest.fixture(scope="module")
def v1_state(networks: tuple[UNet2DConditionModel, nn.Module]) -> dict[str, Tensor]:
    """A v1 checkpoint's tensors: the recorded VAE, random UNet and ControlNet, and the other names of a real one."""
    unet, controlnet = networks
    weights = recorded("v1_tiny_weights")
    state = {key: value for key, value in weights.items() if key.startswith("first_stage_model.")}
    for key in list(state):
        if ".encoder." in key:
            state[key.replace("first_stage_model.", "cond_encoder.")] = state[key].clone()
    state |= {key: value for key, value in weights.items() if key.startswith("cond_encoder.")}
    tensors = unet.state_dict()
    state |= {f"model.diffusion_model.{name}": tensors[key] for key, name in unet_names(tensors, 2).items()}
    tensors = controlnet.state_dict()
    condition = tensors.pop("controlnet_cond_embedding.weight")
    bias = tensors.pop("controlnet_cond_embedding.bias")
    state |= {f"control_model.{name}": tensors[key].clone() for key, name in unet_names(tensors, 2).items()}
    state[FIRST] = torch.cat([state[FIRST], condition], dim=1)
    state["control_model.input_blocks.0.0.bias"] += bias
    with np.load(DATA / "v1_tiny_io.npz") as arrays:
        state |= {str(name): torch.zeros(2) for name in arrays["other_state_keys"]}
    return state


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, networks: tuple[UNet2DConditionModel, nn.Module]) -> Path:
    """A directory laid out as Stable Diffusion 2.1-base is, of the recording's size."""
    folder = tmp_path_factory.mktemp("base")
    unet, _ = networks
    unet.save_config(folder / "unet")
    save_file(unet.state_dict(), folder / "unet" / WEIGHTS)
    with seeded_init(2):
        AutoencoderKL(**VAE).save_pretrained(folder / "vae")
        save_text_tower(folder)
    return folder


def write(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"state_dict": state, "epoch": 3, "global_step": 25001}, folder / "v1.ckpt")
    return folder / "v1.ckpt"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, v1_state: dict[str, Tensor], base: Path) -> CcsrModel:
    folder = tmp_path_factory.mktemp("v1")
    convert_v1(write(v1_state, folder), base, folder / "model")
    return load_model(folder / "model")


def test_v1_networks_arrive_exactly(converted: CcsrModel, networks: tuple[UNet2DConditionModel, nn.Module]) -> None:
    unet, controlnet = networks
    assert converted.config == ModelConfig(preset="custom", family="v1")
    found = converted.unet.state_dict()
    for key, value in unet.state_dict().items():
        assert torch.equal(found[key], value), key
    found = converted.controlnet.state_dict()
    for key, value in controlnet.state_dict().items():
        if key not in ("conv_in.bias", "controlnet_cond_embedding.bias"):
            assert torch.equal(found[key], value), key
    biases = controlnet.conv_in.bias + controlnet.controlnet_cond_embedding.bias
    assert torch.equal(found["conv_in.bias"], biases)
    assert not found["controlnet_cond_embedding.bias"].any()


@torch.no_grad()
def test_v1_vae_gives_the_recorded_numbers(converted: CcsrModel) -> None:
    io = recorded("v1_tiny_io")
    mean, std = converted.encode_moments(io["img01"])
    scale = converted.vae.config.scaling_factor
    assert scale == 0.18215
    assert relative(mean / scale, io["vae_mean"]) < 1e-4
    assert relative(std / scale, (io["vae_logvar"] / 2).exp()) < 1e-4
    assert relative(converted.decode(io["decode_in"]), io["decode_out"]) < 1e-4


@torch.no_grad()
def test_v1_condition_latent_is_the_recorded_one(converted: CcsrModel) -> None:
    """The recording's condition encoder has its own quant_conv, so it is kept beside the VAE."""
    io = recorded("v1_tiny_io")
    assert relative(converted.encode_condition(io["img01"])[0], io["cond_latent"]) < 1e-4
    assert relative(converted.encode_moments(io["img01"])[0], io["cond_latent"]) > 0.1


@torch.no_grad()
def test_v1_condition_encoder_that_is_the_vaes_is_dropped(
    v1_state: dict[str, Tensor], base: Path, tmp_path: Path
) -> None:
    state = {key: value for key, value in v1_state.items() if not key.startswith("cond_encoder.quant_conv.")}
    state |= {f"cond_encoder.quant_conv.{n}": state[f"first_stage_model.quant_conv.{n}"] for n in ("weight", "bias")}
    convert_v1(write(state, tmp_path), base, tmp_path / "model")
    assert not (tmp_path / "model" / "condition_encoder").exists()
    model = load_model(tmp_path / "model")
    image = recorded("v1_tiny_io")["img01"]
    assert torch.equal(model.encode_condition(image)[0], model.encode_moments(image)[0])


def as_checkpoint(model: CcsrModel) -> dict[str, Tensor]:
    """A model's tensors back under a v1 checkpoint's names."""
    state = {}
    for network, prefix in ((model.vae, "first_stage_model"), (model.condition_encoder, "cond_encoder")):
        tensors = network.state_dict()
        for key, name in vae_names(tensors, 4).items():
            if prefix == "first_stage_model" or name.startswith(("encoder", "quant_conv")):
                linear = ".attn_1." in name and tensors[key].dim() == 2
                state[f"{prefix}.{name}"] = tensors[key][..., None, None] if linear else tensors[key]
    tensors = model.unet.state_dict()
    state |= {f"model.diffusion_model.{name}": tensors[key] for key, name in unet_names(tensors, 2).items()}
    tensors = model.controlnet.state_dict()
    condition = tensors.pop("controlnet_cond_embedding.weight")
    assert not tensors.pop("controlnet_cond_embedding.bias").any()
    state |= {f"control_model.{name}": tensors[key] for key, name in unet_names(tensors, 2).items()}
    state[FIRST] = torch.cat([state[FIRST], condition], dim=1)
    return state


NETWORKS = ("first_stage_model.", "cond_encoder.", "model.diffusion_model.", "control_model.")


def test_v1_round_trip_is_exact(v1_state: dict[str, Tensor], converted: CcsrModel) -> None:
    found = as_checkpoint(converted)
    assert found.keys() == {key for key in v1_state if key.startswith(NETWORKS)}
    assert all(torch.equal(value, v1_state[key]) for key, value in found.items())


@torch.no_grad()
def test_v1_control_taps_are_the_recorded_ones() -> None:
    """The first three of the recorded ControlNet's ten outputs: time embedding, split first convolution, attention."""
    io, weights = recorded("v1_tiny_io"), recorded("v1_tiny_weights")
    unet = UNet2DConditionModel(
        **{
            **UNET,
            "block_out_channels": (32,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
            "attention_head_dim": 2,
        }
    )
    controlnet = latent_controlnet(unet).eval()
    names = unet_names({key: 0 for key in controlnet.state_dict() if "cond_embedding" not in key}, 2)
    state = {key: weights[f"control_model.{name}"] for key, name in names.items() if f"control_model.{name}" in weights}
    assert {key.split(".")[0] for key in set(names) - set(state)} == {"mid_block", "controlnet_mid_block"}
    state["conv_in.weight"], state["controlnet_cond_embedding.weight"] = weights[FIRST].split(4, dim=1)
    controlnet.load_state_dict(state, strict=False)
    taps, _ = controlnet(io["x"], io["t"], io["context"], controlnet_cond=io["cond_latent"], return_dict=False)
    for index in range(3):
        assert relative(taps[index], io[f"control_{index:02d}"]) < 1e-5, index


def test_prompt_is_the_text_encoders_for_start_end_and_zeros(converted: CcsrModel, base: Path) -> None:
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder").eval()
    with torch.no_grad():
        expected = encoder(input_ids=torch.tensor([[298, 299, 0, 0, 0, 0, 0]])).last_hidden_state
    assert list(converted.prompts) == [""]
    assert torch.equal(converted.prompt, expected)


def test_v1_prefix_of_data_parallel_and_safetensors_are_read(
    v1_state: dict[str, Tensor], base: Path, converted: CcsrModel, tmp_path: Path
) -> None:
    save_file({f"module.{key}": value for key, value in v1_state.items()}, tmp_path / "v1.safetensors")
    convert_v1(tmp_path / "v1.safetensors", base, tmp_path / "model")
    found = load_model(tmp_path / "model").unet.state_dict()
    assert all(torch.equal(found[key], value) for key, value in converted.unet.state_dict().items())


def test_a_pruned_half_precision_v1_file_is_read_and_what_it_lacks_is_named(
    v1_state: dict[str, Tensor], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As people share it: safetensors, float16, without schedules, losses, text tower and the copied encoder."""
    networks = ("model.diffusion_model.", "control_model.", "first_stage_model.")
    pruned = {key: value.half().contiguous() for key, value in v1_state.items() if key.startswith(networks)}
    save_file(pruned, tmp_path / "pruned.safetensors")
    convert_v1(tmp_path / "pruned.safetensors", base, tmp_path / "model")
    assert "no cond_encoder" in capsys.readouterr().err
    model = load_model(tmp_path / "model")
    assert model.condition_encoder is None
    expected = pruned["model.diffusion_model.input_blocks.0.0.weight"].float()
    assert torch.equal(model.unet.conv_in.weight, expected)
    save_file({key: value for key, value in pruned.items() if key.startswith("control")}, tmp_path / "c.safetensors")
    with pytest.raises(ModelError, match=r"lacks its UNet \(model.diffusion_model.\*\), its VAE \(first_stage"):
        convert_v1(tmp_path / "c.safetensors", base, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def _without(key: str) -> dict:
    return {"drop": key}


DAMAGE = {
    "missing": (_without("model.diffusion_model.out.2.bias"), "tensor model.diffusion_model.out.2.bias is missing"),
    "first difference": (
        _without("control_model.time_embed.0.weight"),
        "tensor control_model.time_embed.0.weight is missing",
    ),
    "surplus": ({"set": ("model.adapter.weight", torch.zeros(2))}, "tensor model.adapter.weight has no place"),
    "another family": ({"drop": "control_model."}, "not a CCSR v1 checkpoint: no control_model"),
    "misshapen": (
        {"set": ("first_stage_model.post_quant_conv.bias", torch.zeros(5))},
        r"tensor first_stage_model.post_quant_conv.bias has shape \(5,\), not \(4,\)",
    ),
    "four channels": (
        {"set": (FIRST, torch.zeros(32, 4, 3, 3))},
        r"input_blocks.0.0.weight has shape \(32, 4, 3, 3\), not \(\*, 8, 3, 3\)",
    ),
    "nan": ({"set": ("first_stage_model.post_quant_conv.bias", torch.full((4,), torch.nan))}, "holds NaN"),
    "misshapen condition encoder": (
        {"set": ("cond_encoder.quant_conv.bias", torch.zeros(4))},
        r"tensor cond_encoder.quant_conv.bias has shape \(4,\), not \(8,\)",
    ),
    "nan in the condition encoder": (
        {"set": ("cond_encoder.quant_conv.bias", torch.full((8,), torch.nan))},
        "tensor cond_encoder.quant_conv.bias holds NaN",
    ),
    "no condition encoder": ({"drop": "cond_encoder."}, "tensor cond_encoder.encoder.conv_in.weight is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_v1_checkpoint_is_refused_by_its_first_difference(
    name: str, v1_state: dict[str, Tensor], base: Path, tmp_path: Path
) -> None:
    damage, message = DAMAGE[name]
    state = {key: value for key, value in v1_state.items() if not key.startswith(damage.get("drop", "\0"))}
    state |= dict([damage["set"]]) if "set" in damage else {}
    checkpoint = write(state, tmp_path)
    with pytest.raises(ModelError, match=message):
        convert_v1(checkpoint, base, tmp_path / "out")
    assert os.listdir(tmp_path) == ["v1.ckpt"]


def test_truncated_foreign_and_missing_files_are_refused(
    v1_state: dict[str, Tensor], base: Path, tmp_path: Path
) -> None:
    checkpoint = write(v1_state, tmp_path)
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="not a complete checkpoint"):
        convert_v1(checkpoint, base, tmp_path / "out")
    torch.save({"state_dict": {"weight": Path("/tmp")}}, checkpoint)  # an object, which weights_only refuses
    with pytest.raises(ModelError, match="not a complete checkpoint of tensors"):
        convert_v1(checkpoint, base, tmp_path / "out")
    with pytest.raises(ModelError, match=r"absent\.ckpt is missing"):
        convert_v1(tmp_path / "absent.ckpt", base, tmp_path / "out")
    assert os.listdir(tmp_path) == ["v1.ckpt"]


def test_base_of_another_kind_is_refused(v1_state: dict[str, Tensor], base: Path, tmp_path: Path) -> None:
    other = tmp_path / "base"
    shutil.copytree(base, other)
    (other / "scheduler").mkdir()
    place = other / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps({"prediction_type": "v_prediction"}))
    with pytest.raises(ModelError, match="predicts v, not the noise"):
        convert_v1(write(v1_state, tmp_path), other, tmp_path / "out")
    place.write_text(json.dumps({"prediction_type": "epsilon"}))
    shutil.rmtree(other / "text_encoder")
    with pytest.raises(ModelError, match="text encoder is missing"):
        convert_v1(tmp_path / "v1.ckpt", other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_base_the_architecture_is_stable_diffusions(v1_state: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has shape .*, not \(320, 4, 3, 3\)"):
        convert_v1(write(v1_state, tmp_path), None, tmp_path / "out")


def v2_directories(networks: tuple[UNet2DConditionModel, nn.Module], folder: Path) -> tuple[Path, Path]:
    """controlnet/ and vae/ as v2 publishes them."""
    _, controlnet = networks
    (folder / "control" / "controlnet").mkdir(parents=True)
    config = {**controlnet.config, "_class_name": "ControlNetModel", "use_vae_encode_condition": True}
    config |= {"conditioning_channels": 3, "conditioning_embedding_out_channels": [16, 32, 96, 256]}
    config.pop("_use_default_values", None)
    (folder / "control" / "controlnet" / "config.json").write_text(json.dumps(config))
    state = {
        key.replace("controlnet_cond_embedding", "condition_conv_in"): value
        for key, value in controlnet.state_dict().items()
    }
    save_file(state, folder / "control" / "controlnet" / WEIGHTS)
    with seeded_init(7):
        AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    return folder / "control", folder / "vae"


def test_v2_directories_arrive_exactly(
    networks: tuple[UNet2DConditionModel, nn.Module], base: Path, tmp_path: Path
) -> None:
    control, vae = v2_directories(networks, tmp_path)
    convert_v2(control, vae, base, tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert model.config.family == "v2"
    parts = (
        (model.controlnet, networks[1].state_dict()),
        (model.vae, load_file(vae / WEIGHTS)),
        (model.unet, networks[0].state_dict()),
    )
    for network, expected in parts:
        found = network.state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert set(model.prompts) == {"", V2_PROMPT, V2_NEGATIVE_PROMPT}
    assert not torch.equal(model.prompts[V2_PROMPT], model.prompt)


def test_v2_vae_with_the_attention_names_of_its_time(
    networks: tuple[UNet2DConditionModel, nn.Module], base: Path, tmp_path: Path
) -> None:
    control, vae = v2_directories(networks, tmp_path)
    state = load_file(vae / WEIGHTS)
    old = {}
    for key, value in state.items():
        for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{name}.")
        old[key] = value
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in old
    save_file(old, vae / WEIGHTS)
    convert_v2(control, vae, base, tmp_path / "model")
    found = load_model(tmp_path / "model").vae.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_v2_of_another_family_or_truncated_is_refused(
    networks: tuple[UNet2DConditionModel, nn.Module], base: Path, tmp_path: Path
) -> None:
    control, vae = v2_directories(networks, tmp_path)
    with pytest.raises(ModelError, match="takes an RGB image"):
        convert_v2(vae, vae, base, tmp_path / "out")
    with pytest.raises(ModelError, match="the config is of a UNet2DConditionModel, not of a"):
        convert_v2(control, base / "unet", base, tmp_path / "out")
    weights = control / "controlnet" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        convert_v2(control, vae, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def open_clip_tower(width: int, length: int, blocks: int, vocabulary: int) -> dict[str, Tensor]:
    """Random tensors under OpenCLIP's names."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    state = {"token_embedding.weight": draw(vocabulary, width), "positional_embedding": draw(length, width)}
    state |= {"ln_final.weight": 1 + draw(width), "ln_final.bias": draw(width)}
    shapes = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
        "ln_1.bias": (width,),
        "ln_2.bias": (width,),
    }
    for block in range(blocks):
        state |= {f"transformer.resblocks.{block}.{key}": draw(*shape) for key, shape in shapes.items()}
        state |= {f"transformer.resblocks.{block}.{key}.weight": 1 + draw(width) for key in ("ln_1", "ln_2")}
    return state


def test_without_base_the_text_tower_is_the_checkpoints(
    v1_state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(UNET_CONFIGS, "sd21", UNET)
    monkeypatch.setitem(VAE_CONFIGS, "sd21", VAE)
    with pytest.raises(ModelError, match="holds no text tower"):
        convert_v1(write(v1_state, tmp_path), None, tmp_path / "model")
    tower = open_clip_tower(width=16, length=7, blocks=3, vocabulary=300)
    extra = {"text_projection": torch.zeros(16, 16), "logit_scale": torch.zeros(())}
    full = {f"cond_stage_model.model.{key}": value for key, value in (tower | extra).items()}
    convert_v1(write(v1_state | full, tmp_path), None, tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert model.config == ModelConfig(preset="sd21", family="v1")
    assert torch.equal(model.prompt, embed_empty_prompt_open_clip(tower, "test"))


def test_open_clip_tower_matches_its_definition() -> None:
    """A pre-norm transformer with a causal mask, read after the last block but one, through the final norm."""
    width, length, blocks, vocabulary = 128, 6, 3, 40
    state = open_clip_tower(width, length, blocks, vocabulary)
    tokens = torch.tensor([vocabulary - 2, vocabulary - 1, 0, 0, 0, 0])
    x = (state["token_embedding.weight"][tokens] + state["positional_embedding"])[None]
    mask = torch.full((length, length), -torch.inf).triu(1)
    for block in range(blocks - 1):
        own = {
            key.split(f"resblocks.{block}.")[1]: value for key, value in state.items() if f"resblocks.{block}." in key
        }
        normed = nn.functional.layer_norm(x, (width,), own["ln_1.weight"], own["ln_1.bias"])
        attention = nn.MultiheadAttention(width, width // 64, batch_first=True)
        attention.load_state_dict({key[5:]: value for key, value in own.items() if key.startswith("attn.")})
        x = x + attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        normed = nn.functional.layer_norm(x, (width,), own["ln_2.weight"], own["ln_2.bias"])
        hidden = nn.functional.gelu(normed @ own["mlp.c_fc.weight"].T + own["mlp.c_fc.bias"])
        x = x + hidden @ own["mlp.c_proj.weight"].T + own["mlp.c_proj.bias"]
    expected = nn.functional.layer_norm(x, (width,), state["ln_final.weight"], state["ln_final.bias"])

    assert relative(embed_empty_prompt_open_clip(state, "test"), expected.detach()) < 1e-5
    del state["transformer.resblocks.1.mlp.c_fc.bias"]
    with pytest.raises(ModelError, match=r"tensor transformer\.resblocks\.1\.mlp\.c_fc\.bias is missing"):
        embed_empty_prompt_open_clip(state, "test")


@pytest.mark.slow
@torch.no_grad()
def test_complete_recorded_checkpoint(base: Path, tmp_path: Path) -> None:
    folder = recordings("ccsr")
    with np.load(folder / "v1_tiny_ckpt.npz") as arrays:
        state = {key.removeprefix("sd/"): torch.from_numpy(arrays[key]) for key in arrays.files}
    with np.load(folder / "v1_tiny_io.npz") as arrays:
        io = {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].dtype.kind in "fi"}
    convert_v1(write(state, tmp_path), base, tmp_path / "model")
    model = load_model(tmp_path / "model")
    back = as_checkpoint(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in back.items())
    assert relative(model.encode_condition(io["img01"])[0], io["cond_latent"]) < 1e-4
    eps = model.denoiser(io["cond_latent"], io["context"])(io["x"], io["t"])
    assert relative(eps, io["eps"]) < 1e-4
    assert relative(model.unet(io["x"], io["t"], io["context"]).sample, io["eps_nocontrol"]) < 1e-4
    taps, middle = model.controlnet(
        io["x"], io["t"], io["context"], controlnet_cond=io["cond_latent"], return_dict=False
    )
    for index, tap in enumerate([*taps, middle]):
        assert relative(tap, io[f"control_{index:02d}"]) < 1e-5, index
    mean, std = model.encode_moments(io["img01"])
    assert relative(mean / 0.18215, io["vae_mean"]) < 1e-4
    assert relative((std / 0.18215).log() * 2, io["vae_logvar"]) < 1e-4
    assert relative(model.decode(io["decode_in"]), io["decode_out"]) < 1e-4
