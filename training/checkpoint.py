"""Checkpoints: named fp32 tensors as safetensors plus one JSON, the same for every world size and ZeRO stage."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra.errors import ModelError
from infra.storage import download, exists, join, list_files, read_json, remove, sha256_file, upload, write_bytes

FORMAT = "ccsr-checkpoint-1"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainingState:
    """All that a run needs to go on: fp32 tensors by name, and `facts` (position, config, dataset ids, commit)."""

    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # file name without suffix -> tensors


def engine_state(engine: Any, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Parameters and moments of a DeepSpeed engine by name, in full and in fp32. Collective: every rank calls it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in engine.module.trained.named_parameters():
        if hasattr(parameter, "_hp_mapping"):
            weights[name] = safe_get_full_fp32_param(parameter).detach().cpu().clone()
            for kind in MOMENTS:
                moments[f"{kind}.{name}"] = safe_get_full_optimizer_state(parameter, kind).detach().cpu().clone()
        else:  # ZeRO 0: the plain optimiser holds the state
            weights[name] = parameter.detach().float().cpu().clone()
            for kind in MOMENTS:
                moments[f"{kind}.{name}"] = optimizer.state[parameter][kind].detach().float().cpu().clone()
    return {"weights": weights, "moments": moments}


def restore_engine(
    engine: Any, optimizer: torch.optim.Optimizer, tensors: dict[str, dict[str, Tensor]], num_updates: int
) -> None:
    """Put `engine_state`'s tensors back into an engine of any world size and ZeRO stage, before its first step."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    step = torch.tensor(float(num_updates))
    partitioned = hasattr(next(engine.module.trained.parameters()), "_hp_mapping")
    if partitioned:
        for group in optimizer.param_groups:  # DeepSpeed put its flat partitions there
            for flat in group["params"]:
                optimizer.state[flat] = {"step": step.clone(), **{kind: torch.zeros_like(flat) for kind in MOMENTS}}
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.trained.named_parameters():
        weight = tensors["weights"][name].to(parameter.device)
        state = {kind: tensors["moments"][f"{kind}.{name}"].to(parameter.device) for kind in MOMENTS}
        if partitioned:
            safe_set_full_fp32_param(parameter, weight)
            for kind in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[kind], kind)
        else:
            parameter.data.copy_(weight)
            optimizer.state[parameter] = {"step": step.clone(), **state}
    if partitioned:
        engine.optimizer.update_lp_params()


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
    """Put `module_state`'s tensors back."""
    prefix = "weights."
    module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    for name, parameter in module.named_parameters():
        state = {kind: tensors[f"{kind}.{name}"].to(parameter.device) for kind in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(num_updates)), **state}


def save_checkpoint(output: str, state: TrainingState, *, keep: int) -> str:
    """Write OUT/checkpoints/POSITION, `complete.json` last, then remove all but the newest `keep` complete ones.

    What an interrupted save or removal left goes too. One process per run calls this.
    """
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
    kept = complete_checkpoints(output)[-keep:]
    root = join(output, "checkpoints")
    places = {join(root, file.removeprefix(f"{root}/").split("/")[0]) for file in list_files(root)}
    for old in sorted(places - set(kept)):
        remove_checkpoint(old)
    return place


def complete_checkpoints(output: str) -> list[str]:
    """The complete checkpoints of a run, oldest first."""
    suffix = "/complete.json"
    return [file.removesuffix(suffix) for file in list_files(join(output, "checkpoints")) if file.endswith(suffix)]


def remove_checkpoint(place: str) -> None:
    """Remove a checkpoint, `complete.json` first: a reader never takes a half-removed one for complete."""
    for file in sorted(list_files(place), key=lambda file: not file.endswith("/complete.json")):
        remove(file)


def load_checkpoint(place: str) -> TrainingState:
    """Read one complete checkpoint. ModelError for another format or a file whose hash does not match."""
    if not exists(join(place, "complete.json")):
        raise ModelError(
            "this checkpoint is not complete", where=place, todo="use an earlier one, or remove its folder"
        )
    state = TrainingState(read_json(join(place, "state.json")))
    if state.facts.get("format") != FORMAT:
        found = state.facts.get("format")
        raise ModelError(f"unknown checkpoint format {found!r}", where=place, todo=f"expected {FORMAT}")
    with tempfile.TemporaryDirectory(prefix="ccsr-checkpoint-") as folder:
        for name, expected in read_json(join(place, "complete.json")).items():
            local = download(join(place, name), Path(folder))
            if sha256_file(local) != expected:
                raise ModelError(
                    f"{name} is damaged: its sha256 is not the one in complete.json",
                    where=place,
                    todo="remove this checkpoint's folder; the run goes on from the one before",
                )
            if local.suffix == ".safetensors":
                state.tensors[local.stem] = load_file(local)
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
