"""Model directories by path or URI: identity, fetching, publishing, and export of a trained part."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from infra.errors import ModelError
from infra.files.publish import shared_copy, upload_folder
from infra.files.storage import exists, join, short_hash
from training.models.ccsr import CcsrModel
from training.models.directory import (
    check_keys,
    load_model,
    load_part,
    read_record,
    replacing,
    save_model,
    save_part,
    write_record,
)
from training.models.onestep import OneStepModel


def model_id(uri: str | None) -> str:
    """Identifies a model directory by its content (the hash of its ccsr.json); "random" for none."""
    if not uri:
        return "random"
    place = join(uri, "ccsr.json")
    if not exists(place):
        raise ModelError(
            "there is no complete model directory here (ccsr.json is missing)",
            where=uri,
            todo="give the `model` folder of a finished training run",
        )
    return short_hash(place)


def fetch_model(uri: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> CcsrModel:
    """The model in a directory or s3:// prefix, in eval mode; on CUDA in channels-last layout. Errors: `load_model`."""
    with shared_copy(uri, "ccsr.json") as folder:
        model = load_model(folder, device=device, dtype=dtype)
    if device.startswith("cuda"):
        for network in model.networks.values():
            network.to(memory_format=torch.channels_last)
    return model


def merged(directory: Path, folder: Path) -> Path:
    """A model directory without LoRAs: `directory` itself, or where it has some, `folder` with them merged."""
    model = load_model(directory) if (directory / "lora").is_dir() else None
    if not isinstance(model, OneStepModel):
        return directory
    save_model(model.merged(), folder)
    return folder


def publish_model(directory: Path, uri: str) -> None:
    """Put a local model directory in place of the one at `uri`, which is incomplete while files are replaced."""
    upload_folder(directory, uri, last="ccsr.json")


def export_trained(
    base: Path, part: str, subparts: Sequence[str], weights: Mapping[str, Tensor], directory: Path
) -> None:
    """Write a copy of the model directory `base` with `weights`, by parameter name, in its network `part`.

    They are all parameters of that network, or of its `subparts` if any are named; ModelError otherwise. No other
    network is loaded.
    """
    network = load_part(base / part, part)
    trained = nn.ModuleDict({name: getattr(network, name) for name in subparts}) if subparts else network
    check_keys(dict(trained.named_parameters()), weights, where=base / part)
    trained.load_state_dict(dict(weights), strict=False)  # there may be buffers besides
    with replacing(directory) as partial:
        shutil.copytree(base, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns("ccsr.json", part))
        save_part(network, part, partial)
        write_record(read_record(base), partial)
