"""Model directories: networks as diffusers writes them, prompt.safetensors, and ccsr.json last."""

import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError  # what torch.load(weights_only=True) raises; nothing is unpickled here
from typing import Any, Literal, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra.errors import ModelError, StorageError, line_of
from infra.files.publish import sync
from infra.files.storage import explained, read_json, sha256_file
from training.config import ModelConfig
from training.models.build import MODELS
from training.models.ccsr import CcsrModel
from training.models.library import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from training.models.networks import from_stock_condition, to_stock_condition, with_latent_condition
from training.models.onestep import OneStepAdapter
from training.models.stablesr import StableSrAdapter
from training.models.wrapping import FeatureWrapping

OPTIONAL = ("lora", "condition_encoder", "wrapping")
PARTS = {
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
    "controlnet": ControlNetModel,
    "adapter": StableSrAdapter,
    "lora": OneStepAdapter,
    "condition_encoder": AutoencoderKL,
    "wrapping": FeatureWrapping,
}
NetworkT = TypeVar("NetworkT", bound=nn.Module)
WEIGHTS = "diffusion_pytorch_model.safetensors"
PROMPTS = "prompt.safetensors"

# Autoencoders written by diffusers before 0.15, Stable Diffusion 2.1's among them, name their attention layers so.
_OLD_ATTENTION = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class ModelRecord(ModelConfig):
    """ccsr.json: what the directory holds, and the sha256 of each of its other files."""

    format: Literal[1]
    sha256: dict[str, str]


def save_model(model: CcsrModel, directory: Path | str) -> None:
    """Write `model` as a directory, all or nothing; a complete directory of the same name is replaced.

    Each part of CCSR loads with plain diffusers' `from_pretrained`, the ControlNet too: it then takes the LR latent as
    `controlnet_cond`. Raises ModelError where a weight is not finite.
    """
    with replacing(Path(directory)) as partial:
        for name, part in model.networks.items():
            save_part(part, name, partial)
        prompts = {text: embedding.float().cpu().contiguous() for text, embedding in model.prompts.items()}
        write_weights(prompts, partial / PROMPTS)
        write_record(model.config, partial)


def save_part(network: Any, name: str, directory: Path) -> None:
    """Write one network as `directory`/`name`. ModelError where a weight is not finite."""
    check_finite(network.state_dict(), where=name)
    network.save_config(directory / name)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}
    if name == "controlnet":
        state = to_stock_condition(state)
    write_weights(state, directory / name / WEIGHTS, metadata={"format": "pt"})


def write_record(config: ModelConfig, directory: Path) -> None:
    """Write ccsr.json, which makes the directory complete."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in files:
        path.chmod(0o644)  # safetensors leaves its files readable to their owner alone
        sync(path)
    hashes = {path.relative_to(directory).as_posix(): sha256_file(path) for path in files}
    values = config.model_dump(include=set(ModelConfig.model_fields))
    record = ModelRecord(format=1, sha256=hashes, **values)
    (directory / "ccsr.json").write_text(record.model_dump_json(indent=1) + "\n")


def read_record(directory: Path) -> ModelRecord:
    """ccsr.json; ModelError where it is missing or of another format."""
    try:
        return ModelRecord(**read_part_json(directory / "ccsr.json"))
    except ValidationError as error:
        raise ModelError(
            f"ccsr.json is not a model's record of format 1 ({error.errors()[0]['msg']})",
            where=str(directory / "ccsr.json"),
            todo="convert the original weights again: ccsr convert",
        ) from error


def load_model(
    directory: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CcsrModel:
    """The model in `directory`, in eval mode on `device`. Peak host memory is the networks' own size.

    Raises ModelError naming the first difference: a missing file, another format, bytes that are not those that were
    written, a missing, surplus or misshapen tensor, a weight that is not finite.
    """
    directory = Path(directory)
    record = read_record(directory)
    for name, expected in record.sha256.items():
        if not (directory / name).is_file():
            raise _missing(directory / name)
        if sha256_file(directory / name) != expected:
            raise ModelError(
                f"{name} is truncated or changed: its sha256 is not the one in ccsr.json",
                where=str(directory / name),
                todo="copy the directory again, or convert again",
            )
    config = ModelConfig(preset=record.preset, family=record.family, prediction=record.prediction)
    needed = {"vae", "unet", config.facts.adapter} - {*OPTIONAL}
    names = [name for name in PARTS if name in needed or f"{name}/{WEIGHTS}" in record.sha256]
    parts = {name: load_part(directory / name, name) for name in names}
    parts["adapter"] = parts.pop(config.facts.adapter, None)
    prompts = read_weights(directory / PROMPTS)
    return MODELS[config.family](config=config, prompts=prompts, **parts).to(device, dtype)


def load_part(directory: Path, name: str) -> Any:
    """One network (`name` in PARTS) from config.json and weights in `directory`, float32, in eval mode."""
    network = part_from_config(read_part_json(directory / "config.json"), name, where=directory / "config.json")
    state = {_OLD_ATTENTION.sub(_new_attention, key): value for key, value in read_weights(directory / WEIGHTS).items()}
    if name == "controlnet":
        state = from_stock_condition(state, where=str(directory / WEIGHTS))
    return fill(network, state, where=directory / WEIGHTS)


def _new_attention(old: re.Match[str]) -> str:
    return _NEW_ATTENTION[old[1]]


def part_from_config(config: Mapping[str, Any], name: str, where: Path) -> nn.Module:
    """The network that a diffusers config describes, without memory (on the meta device)."""
    expected = PARTS[name]
    if config.get("_class_name") != expected.__name__:
        raise ModelError(
            f"the config is of a {config.get('_class_name')}, not of a {expected.__name__}",
            where=str(where),
            todo=f"give a directory whose {name}/ holds that network",
        )
    with torch.device("meta"):
        network = expected.from_config(dict(config))
        return with_latent_condition(network) if name == "controlnet" else network


def fill(network: NetworkT, state: Mapping[str, Tensor], where: Path | str) -> NetworkT:
    """Give a network, which may be on the meta device, the tensors of `state` as float32; strict. In eval mode then."""
    check_keys(network.state_dict(), state, where)
    check_finite(state, where)
    network.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
    return network.eval()


def check_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: Path | str) -> None:
    """Raise ModelError at the first tensor that is missing, has another shape, or has no place."""
    for key, tensor in expected.items():
        if key not in found:
            what = f"tensor {key} is missing"
        elif found[key].shape != tensor.shape:
            what = f"tensor {key} has shape {tuple(found[key].shape)}, not {tuple(tensor.shape)}"
        else:
            continue
        raise ModelError(
            what, where=str(where), todo="copy or fetch the file again, or make the model anew: ccsr convert"
        )
    surplus = [key for key in found if key not in expected]
    if surplus:
        raise ModelError(
            f"tensor {surplus[0]} has no place in this network ({len(surplus)} such)",
            where=str(where),
            todo="give this network's own file, or make the model anew: ccsr convert",
        )


def check_finite(state: Mapping[str, Tensor], where: Path | str) -> None:
    """Raise ModelError at the first tensor that holds NaN or infinity."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(
                f"tensor {key} holds NaN or infinity",
                where=str(where),
                todo="take an earlier checkpoint; this one cannot be repaired",
            )


def write_weights(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous tensors as a safetensors file. OSError where it cannot be written (a full disk)."""
    try:
        save_file(dict(state), path, metadata=metadata)
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    if not path.is_file():
        raise _missing(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(
            f"{path.name} is not a complete safetensors file ({error})", where=str(path), todo="copy or fetch it again"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.ckpt`, `.pth` or `.safetensors` by name, without Lightning's wrapper or leading `module.`."""
    if path.suffix == ".safetensors" or not path.is_file():
        content: Any = read_weights(path)
    else:
        content = torch_load(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    state = {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise ModelError("no tensors by name in this file", where=str(path), todo="give a checkpoint's state_dict")
    return state


def torch_load(path: Path) -> Any:
    """What `torch.save` wrote of tensors and plain values; anything else is not unpickled but refused."""
    try:
        with explained("cannot read", str(path)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise ModelError(
            f"not a complete checkpoint of tensors ({line_of(error)})",
            where=str(path),
            todo="copy or fetch the file again and compare its sha256",
        ) from error


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `directory` when the block ends well, and vanishes otherwise.

    Raises StorageError where `directory` holds something that is not a model, and where it cannot be written.
    """
    if directory.exists() and not (directory / "ccsr.json").is_file() and any(directory.iterdir()):
        raise StorageError(
            "the output folder holds something that is not a model directory",
            where=str(directory),
            todo="choose another folder, or empty this one",
        )
    with explained("cannot write", str(directory)):
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        try:
            (partial / "new").mkdir()
            yield partial / "new"
            if directory.exists():
                directory.rename(partial / "old")
            (partial / "new").rename(directory)
            sync(directory.parent)
        finally:
            if (partial / "old").exists() and not directory.exists():
                (partial / "old").rename(directory)
            shutil.rmtree(partial, ignore_errors=True)


def read_part_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory; ModelError where it is missing or damaged."""
    if not path.is_file():
        raise _missing(path)
    try:
        return read_json(str(path))
    except StorageError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise ModelError(error.what, where=error.where, todo="copy it again") from error


def _missing(path: Path) -> ModelError:
    return ModelError(
        f"{path.name} is missing", where=str(path), todo="give a complete directory, or make one with ccsr convert"
    )
