"""Checkpoints: named fp32 tensors as safetensors plus one JSON, the same for every world size and ZeRO stage."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra.errors import ModelError
from infra.publish import download, upload, write_bytes
from infra.storage import exists, join, list_files, read_json, remove, sha256_file

FORMAT = "ccsr-checkpoint-1"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """All that a run needs to go on: fp32 tensors by name, and `facts` (position, config, dataset ids, commit)."""

    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # file name without suffix -> tensors


def module_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and moments of a plain replicated module by name."""
    tensors = {f"weights.{name}": tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for kind in MOMENTS:
            tensors[f"{kind}.{name}"] = optimizer.state[parameter][kind].detach().cpu().clone()
    return tensors


def restore_module(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], num_updates: int
) -> None:
    """Put `module_state`'s tensors back. BatchNorm's running statistics in an earlier version's file are left out."""
    module.load_state_dict({name: tensors[f"weights.{name}"] for name in module.state_dict()})
    for name, parameter in module.named_parameters():
        state = {kind: tensors[f"{kind}.{name}"].to(parameter.device) for kind in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(num_updates)), **state}


def save_checkpoint(output: str, state: TrainingState, *, keep: int) -> str:
    """Write OUT/checkpoints/POSITION, `complete.json` last, then remove all but the newest `keep` and the best one.

    What an interrupted save or removal left goes too. One process per run calls this. ModelError where any tensor is
    not finite: such a checkpoint would only push out one that a run can resume from.
    """
    for group, tensors in state.tensors.items():
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ModelError(
                    f"{group}: tensor {name} is not finite after update {state.facts['num_updates']}; "
                    "nothing was saved",
                    where=output,
                    todo="lower the learning rate and run again from the checkpoint before, which is kept",
                )
    place = join(output, "checkpoints", f"{state.facts['position']:012d}")
    if exists(join(place, "complete.json")):  # one that was found damaged and is made again
        remove_checkpoint(place)
    with tempfile.TemporaryDirectory(prefix="ccsr-checkpoint-") as folder:
        for name, tensors in state.tensors.items():
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, Path(folder) / f"{name}.safetensors")
        facts = json.dumps({"format": FORMAT, **state.facts}, indent=1, sort_keys=True)
        (Path(folder) / "state.json").write_text(facts)
        hashes = {local.name: sha256_file(local) for local in Path(folder).iterdir()}
        for name in hashes:
            upload(Path(folder) / name, join(place, name))
        write_bytes(join(place, "complete.json"), json.dumps(hashes, indent=1, sort_keys=True).encode())
    kept = {*complete_checkpoints(output)[-keep:], best_checkpoint(output)}
    root = join(output, "checkpoints")
    places = {join(root, file.removeprefix(f"{root}/").split("/")[0]) for file in list_files(root)}
    for old in sorted(places - kept):
        remove_checkpoint(old)
    return place


def best_checkpoint(output: str) -> str | None:
    """The complete checkpoint with the highest PSNR-Y in its facts' `validation`; None where none was validated."""
    scores = {
        place: read_json(join(place, "state.json")).get("validation", {}).get("psnr_y")
        for place in complete_checkpoints(output)
    }
    validated = {place: score for place, score in scores.items() if score is not None}
    return max(validated, key=lambda place: validated[place]) if validated else None


def complete_checkpoints(output: str) -> list[str]:
    """The complete checkpoints of a run, oldest first."""
    suffix = "/complete.json"
    return [file.removesuffix(suffix) for file in list_files(join(output, "checkpoints")) if file.endswith(suffix)]


def remove_checkpoint(place: str) -> None:
    """Remove a checkpoint, `complete.json` first: a reader never takes a half-removed one for complete."""
    for file in sorted(list_files(place), key=lambda file: not file.endswith("/complete.json")):
        remove(file)


def load_newest(output: str, warn: Callable[[str], None]) -> tuple[str, TrainingState] | None:
    """The newest complete checkpoint that is intact, with its place; None where the run has none.

    A damaged one loses its `complete.json`, so that nothing counts it as one that is kept, and `warn` is told; the one
    before takes its place. ModelError where all are damaged.
    """
    damage = None
    for place in reversed(complete_checkpoints(output)):
        try:
            return place, load_checkpoint(place)
        except DamagedError as error:
            damage = error
            remove(join(place, "complete.json"))
            warn(f"{error.what}: this checkpoint is passed over ({place})")
    if damage is not None:
        raise ModelError(
            "every checkpoint of this run is damaged",
            where=join(output, "checkpoints"),
            todo="look at the storage; the same command now starts from the first update",
        ) from damage
    return None


class DamagedError(ModelError):
    """A checkpoint whose bytes are not those that were written."""


def load_checkpoint(place: str) -> TrainingState:
    """Read one complete checkpoint. ModelError for another format, DamagedError where a hash does not match."""
    if not exists(join(place, "complete.json")):
        raise ModelError(
            "this checkpoint is not complete", where=place, todo="use an earlier one, or remove its folder"
        )
    with tempfile.TemporaryDirectory(prefix="ccsr-checkpoint-") as folder:
        files = {}
        for name, expected in read_json(join(place, "complete.json")).items():
            if not exists(join(place, name)):
                raise DamagedError(f"{name} is missing", where=place, todo="use an earlier checkpoint")
            local = download(join(place, name), Path(folder))
            if sha256_file(local) != expected:
                raise DamagedError(
                    f"{name} is damaged: its sha256 is not the one in complete.json",
                    where=place,
                    todo="use an earlier checkpoint",
                )
            files[name] = local
        state = TrainingState(read_json(str(files["state.json"])))
        if state.facts.get("format") != FORMAT:
            found = state.facts.get("format")
            raise ModelError(f"unknown checkpoint format {found!r}", where=place, todo=f"expected {FORMAT}")
        for name, local in files.items():
            if local.suffix == ".safetensors":
                state.tensors[Path(name).stem] = load_file(local)
    return state


def check_tensors(place: str, found: dict[str, Tensor], module: nn.Module) -> None:
    """ModelError naming the first tensor by which a checkpoint is of another model than `module`."""
    expected = dict(module.named_parameters())
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            what = f"tensor {name} is only in the {'model' if name in expected else 'checkpoint'}"
        elif found[name].shape != expected[name].shape:
            what = f"tensor {name} is {tuple(found[name].shape)}, the model's is {tuple(expected[name].shape)}"
        else:
            continue
        raise ModelError(f"the checkpoint is of another model: {what}", where=place, todo="use its own config")
