"""OSEDiff's published weights in: a dict of LoRAs and a base become a model directory."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from infra.errors import ModelError
from training.convert.published import check_prediction_type, write_model
from training.convert.text import embed_prompts
from training.models.directory import fill, load_part, torch_load
from training.models.onestep import OneStepAdapter, OneStepModel

PLACES = {"unet": ("encoder", "decoder", "others"), "vae": ("encoder",)}


def convert_onestep(checkpoint: Path | str, base: Path | str, out: Path | str) -> None:
    """Write `out` from OSEDiff's published file and Stable Diffusion 2.1-base, a diffusers or a model directory.

    The file is a dict: ranks, the lists of layers that have LoRA, and two state dicts in peft's names, the UNet's with
    its first convolution. Strict, all or nothing; only tensors, lists and numbers are read. Raises ModelError naming
    the first difference.
    """
    path, base = Path(checkpoint), Path(base)
    content = torch_load(path)
    networks = {part: load_part(base / part, part) for part in PLACES}
    check_prediction_type(base)
    targets = {
        part: {
            f"default_{place}": _layers(content, f"{part}_lora_{place}_modules", networks[part], path)
            for place in places
        }
        for part, places in PLACES.items()
    }
    ranks = {part: _entry(content, f"rank_{part}", int, path) for part in PLACES}
    with torch.device("meta"):
        adapter = OneStepAdapter.for_networks(networks, targets=targets, ranks=ranks)
    states = {part: _entry(content, f"state_dict_{part}", dict, path) for part in PLACES}
    fill(adapter, {f"{part}.{name}": tensor for part, state in states.items() for name, tensor in state.items()}, path)
    write_model(
        **networks,
        adapter=adapter,
        prompts=embed_prompts(base, OneStepModel.cached_prompts),
        family="onestep",
        out=out,
        source=base,
    )


def _entry(content: Any, name: str, kind: type, path: Path) -> Any:
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, kind):
        raise ModelError(
            f"`{name}` is missing or no {kind.__name__}", where=str(path), todo="give OSEDiff's published osediff.pkl"
        )
    return found


def _layers(content: Any, name: str, network: nn.Module, path: Path) -> list[str]:
    layers = _entry(content, name, list, path)
    known = {layer for layer, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for layer in layers:
        if layer not in known:
            raise ModelError(
                f"`{name}` names the layer {layer!r}, which the base does not have",
                where=str(path),
                todo="give the base that it was trained on: ccsr weights fetch sd21-base",
            )
    return layers
