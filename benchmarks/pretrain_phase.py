"""One phase of the tiny base's pretraining: updates, their moving average, and a state that they resume from."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from training.optimizer import EmaConfig


class Phase:
    """Updates at a constant learning rate, whose result is the weights' moving average; resumes where it stopped.

    An average needs no end that is known in advance, so a phase may be trained on at any time.
    """

    def __init__(self, name: str, networks: dict[str, nn.Module], learning_rate: float, out: Path):
        self.rate = learning_rate
        self.networks = nn.ModuleDict(networks)
        self.optimizer = torch.optim.AdamW(self.networks.parameters(), learning_rate, (0.9, 0.99), weight_decay=0.0)
        self.file, self.log = out / f"{name}.safetensors", out / f"{name}.jsonl"
        self.update = 0
        self.average = copy.deepcopy(self.networks)
        if self.file.exists():
            self._load()

    def run(
        self, num_updates: int, every: int, loss: Callable[[int], dict[str, Tensor]], validate: Callable[[], dict]
    ) -> None:
        """Call `loss(update)` up to update `num_updates`; then the networks hold the average.

        Every `every` updates the state is saved, and `validate` of the average and the terms' means are logged.
        """
        sums: dict[str, float] = {}
        if not self.update and num_updates and rank() == 0:
            self._log(validate())
        while self.update < num_updates:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * min((self.update + 1) / 50, 1)
            self.optimizer.zero_grad(set_to_none=True)
            terms = loss(self.update)
            terms["loss"].backward()
            average_gradients(self.networks)
            nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
            self.optimizer.step()
            with torch.no_grad():
                weight = 1 - EmaConfig().decay_at(self.update)
                torch._foreach_lerp_(list(self.average.parameters()), list(self.networks.parameters()), weight)
            self.update += 1
            for key, value in terms.items():
                sums[key] = sums.get(key, 0) + value.item()
            if self.update % every == 0 or self.update == num_updates:
                if rank() == 0:
                    self._save()
                    with self._averaged():
                        means = {key: value / (self.update % every or every) for key, value in sums.items()}
                        self._log(means | validate())
                sums = {}
        self.networks.load_state_dict(self.average.state_dict())

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        current = copy.deepcopy(self.networks.state_dict())
        self.networks.load_state_dict(self.average.state_dict())
        yield
        self.networks.load_state_dict(current)

    def _log(self, values: dict[str, float]) -> None:
        with self.log.open("a") as log:
            log.write(json.dumps({"update": self.update, **{k: round(v, 5) for k, v in values.items()}}) + "\n")

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for part in ("networks", "average"):
            state = getattr(self, part).state_dict()
            tensors |= {f"{part}.{name}": tensor.contiguous() for name, tensor in state.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in moments.items()}
        save_whole(tensors, self.file, {"update": str(self.update)})

    def _load(self) -> None:
        with safe_open(self.file, "pt") as stored:
            names, facts = stored.keys(), stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in names}
        self.update = int(facts["update"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if first.isdigit():
                moments.setdefault(int(first), {})[rest] = tensor
        for part in ("networks", "average"):
            state = {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(part)}
            getattr(self, part).load_state_dict(state)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


def rank() -> int:
    """This process's place among those of `torchrun`; 0 without it."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Return when every process is here."""
    if dist.is_initialized():
        dist.barrier()


def average_gradients(networks: nn.Module) -> None:
    """Every process gets the mean of all processes' gradients."""
    if dist.is_initialized():
        gradients = [p.grad for p in networks.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient) / dist.get_world_size())


def save_whole(tensors: dict[str, Tensor], file: Path, facts: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is there whole or not at all."""
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, facts)
    partial.rename(file)
