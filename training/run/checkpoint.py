"""Checkpoints: named fp32 tensors as safetensors plus one JSON, the same for every world size and ZeRO stage."""

import json
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from infra.errors import ModelError
from infra.files.publish import shared_copy, temporary_folder, upload, write_bytes
from infra.files.storage import exists, join, list_files, name_of, read_json, remove, sha256_file
from training.models.directory import write_weights

FORMAT = "ccsr-checkpoint-1"
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"


@dataclass
class TrainingState:
    """All that a run needs to resume: fp32 tensors by name, and `facts` (position, config, dataset ids, commit)."""

    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # file name without suffix -> tensors

    @property
    def model_weights(self) -> dict[str, Tensor]:
        """What a model directory gets: the average where there is one."""
        return self.tensors.get(EMA, self.tensors["weights"])


def module_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and moments of a plain replicated module by name."""
    tensors = {f"weights.{name}": tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for kind in ADAM_MOMENTS:
            tensors[f"{kind}.{name}"] = optimizer.state[parameter][kind].detach().cpu().clone()
    return tensors


def restore_module(
    module: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], num_updates: int
) -> None:
    """Put `module_state`'s tensors back. BatchNorm's running statistics in an earlier version's file are left out."""
    module.load_state_dict({name: tensors[f"weights.{name}"] for name in module.state_dict()})
    for name, parameter in module.named_parameters():
        state = {kind: tensors[f"{kind}.{name}"].to(parameter.device) for kind in ADAM_MOMENTS}
        optimizer.state[parameter] = {"step": step_tensor(optimizer, parameter, num_updates), **state}


def step_tensor(optimizer: torch.optim.Optimizer, parameter: Tensor, num_updates: int) -> Tensor:
    """AdamW's count of its steps; a fused one has it on the parameter's device."""
    return torch.tensor(float(num_updates), device=parameter.device if optimizer.defaults.get("fused") else "cpu")


def save_checkpoint(
    output: str, state: TrainingState, *, keep: int, damaged: Collection[str] = (), best_by: str | None = "psnr_y"
) -> str:
    """Write OUT/checkpoints/POSITION, `complete.json` last, then remove all but the newest `keep` and the best one.

    `damaged` checkpoints do not count, and those of later positions stay. What an interrupted save or removal left goes
    too. One process per run calls this. ModelError where any tensor is not finite: such a checkpoint would only push
    out one that a run can resume from. StorageError where a disk is full.
    """
    for group, tensors in state.tensors.items():
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ModelError(
                    f"{group}: tensor {name} is not finite after update {state.facts['num_updates']}; "
                    "nothing was saved",
                    where=output,
                    todo=advice(output),
                )
    uri = join(output, "checkpoints", f"{state.facts['position']:012d}")
    if exists(join(uri, "complete.json")):  # one that was found damaged and is made again
        remove_checkpoint(uri)
    with temporary_folder("checkpoint") as folder:
        for name, tensors in state.tensors.items():
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            write_weights(contiguous, folder / f"{name}.safetensors")
        facts = json.dumps({"format": FORMAT, **state.facts}, indent=1, sort_keys=True)
        (folder / "state.json").write_text(facts)
        hashes = {local.name: sha256_file(local) for local in folder.iterdir()}
        for name in hashes:
            upload(folder / name, join(uri, name))
        write_bytes(join(uri, "complete.json"), json.dumps(hashes, indent=1, sort_keys=True).encode())
    damaged = {*damaged} - {uri}
    sound = [one for one in complete_checkpoints(output) if one not in damaged]
    kept = {*sound[-keep:], best_checkpoint(output, damaged, best_by), *(one for one in damaged if one > uri)}
    root = join(output, "checkpoints")
    places = {join(root, file.removeprefix(f"{root}/").split("/")[0]) for file in list_files(root)}
    for old in sorted(places - kept):
        remove_checkpoint(old)
    return uri


def best_checkpoint(output: str, damaged: Collection[str] = (), by: str | None = "psnr_y") -> str | None:
    """The complete checkpoint with the best `by` in its facts' `validation` (PSNR-Y: the highest; of all others the
    lowest); None where none has that number, or without `by`."""
    scores = {
        uri: read_json(join(uri, "state.json")).get("validation", {}).get(by)
        for uri in complete_checkpoints(output)
        if uri not in damaged
    }
    validated = {uri: score for uri, score in scores.items() if score is not None}
    choose = max if by == "psnr_y" else min
    return choose(validated, key=lambda uri: validated[uri]) if validated else None


def position_of(uri: str) -> int:
    """The position in the name of a checkpoint or of an exported model."""
    return int(name_of(uri))


def complete_checkpoints(output: str) -> list[str]:
    """The complete checkpoints of a run, oldest first."""
    suffix = "/complete.json"
    return [file.removesuffix(suffix) for file in list_files(join(output, "checkpoints")) if file.endswith(suffix)]


def advice(output: str) -> str:
    """What to do about numbers that are not finite: a resume under the same config would only meet them again."""
    lower = "lower optimizer.learning_rate or look at these samples"
    if complete_checkpoints(output):
        return f"{lower}, then train into another `output` with `continue_from: {output}` (or {output}@POSITION)"
    return f"{lower}, then run the same command again: this run has no checkpoint yet"


def remove_checkpoint(uri: str) -> None:
    """Remove a checkpoint, `complete.json` first: a reader never takes a half-removed one for complete."""
    for file in sorted(list_files(uri), key=lambda file: not file.endswith("/complete.json")):
        remove(file)


class Newest(NamedTuple):
    """The newest intact checkpoint, and the later ones that were found damaged and passed over."""

    place: str
    state: TrainingState
    damaged: list[str]


def load_newest(output: str, warn: Callable[[str], None], copies: ExitStack | None = None) -> Newest | None:
    """The newest complete checkpoint that is intact; None where the run has none. `copies` as of `load_checkpoint`.

    `warn` reports each one that is passed over. Nothing is removed: another node may read what this one cannot.
    ModelError where all are damaged.
    """
    damaged: list[str] = []
    for uri in reversed(complete_checkpoints(output)):
        try:
            return Newest(uri, load_checkpoint(uri, copies), damaged)
        except DamagedError as error:
            damage = error
            damaged.append(uri)
            warn(f"{error.what}: this checkpoint is passed over ({uri})")
    if damaged:
        raise ModelError(
            "every checkpoint of this run is damaged",
            where=join(output, "checkpoints"),
            todo="restore this folder from a copy, or remove it: the same command then starts from the first update",
        ) from damage
    return None


class DamagedError(ModelError):
    """A checkpoint whose bytes are not those that were written."""


def load_checkpoint(uri: str, copies: ExitStack | None = None) -> TrainingState:
    """Read one complete checkpoint, a second time where the first finds damage.

    The local copy of one on S3 is shared by the node's processes; it stays until `copies` is closed. ModelError for
    another format, DamagedError where a hash does not match twice.
    """
    if not exists(join(uri, "complete.json")):
        raise ModelError("this checkpoint is not complete", where=uri, todo="use an earlier one, or remove its folder")
    with ExitStack() as own:
        enter = (own if copies is None else copies).enter_context
        try:
            return _read(enter(shared_copy(uri, "complete.json")), uri)
        except DamagedError:
            return _read(enter(shared_copy(uri, "complete.json", again=True)), uri)


def _read(folder: Path, uri: str) -> TrainingState:
    try:
        hashes = json.loads((folder / "complete.json").read_bytes())
    except ValueError as error:
        raise DamagedError(
            "complete.json is damaged: it is not JSON", where=uri, todo="use an earlier checkpoint"
        ) from error
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise DamagedError(f"{name} is missing", where=uri, todo="use an earlier checkpoint")
        if sha256_file(folder / name) != expected:
            raise DamagedError(
                f"{name} is damaged: its sha256 is not the one in complete.json",
                where=uri,
                todo="use an earlier checkpoint",
            )
    state = TrainingState(read_json(str(folder / "state.json")))
    if state.facts.get("format") != FORMAT:
        found = state.facts.get("format")
        raise ModelError(f"unknown checkpoint format {found!r}", where=uri, todo=f"expected {FORMAT}")
    for name in hashes:
        if name.endswith(".safetensors"):
            state.tensors[Path(name).stem] = load_file(folder / name)
    return state


def check_names(uri: str, found: dict[str, Tensor], module: nn.Module, what: str) -> None:
    """ModelError where a checkpoint is of another discriminator, or of another kind of critic."""
    for name, tensor in module.state_dict().items():
        if f"weights.{name}" not in found or found[f"weights.{name}"].shape != tensor.shape:
            raise ModelError(
                f"the checkpoint is of another {what}: {name} differs", where=uri, todo="keep decoder_loss and vsd"
            )


def check_tensors(uri: str, found: dict[str, Tensor], module: nn.Module) -> None:
    """ModelError naming the first tensor by which a checkpoint is of another model than `module`."""
    expected = dict(module.named_parameters())
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            what = f"tensor {name} is only in the {'model' if name in expected else 'checkpoint'}"
        elif found[name].shape != expected[name].shape:
            what = f"tensor {name} is {tuple(found[name].shape)}, the model's is {tuple(expected[name].shape)}"
        else:
            continue
        raise ModelError(f"the checkpoint is of another model: {what}", where=uri, todo="use its own config")
