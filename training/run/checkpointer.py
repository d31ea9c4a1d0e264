"""Background checkpointing and resume, the same on all ranks."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from infra.errors import CcsrError, DataError, line_of
from infra.files.storage import join
from infra.run import check_claim
from training.config import TrainConfig
from training.data.order import FEISTEL, SORTED
from training.run.agreement import WorkerContext, agree, attempt, from_rank_0
from training.run.checkpoint import (
    TrainingState,
    check_names,
    check_tensors,
    load_checkpoint,
    load_newest,
    module_state,
    restore_module,
    save_checkpoint,
)
from training.run.monitoring.health import check_replicas
from training.run.step.critics import TrainedCritic
from training.run.step.engine import engine_state, restore_engine


class Checkpoints:
    """The checkpoints of a running engine; a block, at whose end the last write is waited for.

    `critic`: its module and optimiser are saved under its name. `order`: the form of the run's sample order, which a
    resumed checkpoint keeps.
    """

    def __init__(
        self,
        config: TrainConfig,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        critic: TrainedCritic | None,
        context: WorkerContext,
    ) -> None:
        self._config, self._context = config, context
        self._engine, self._optimizer, self._critic = engine, optimizer, critic
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._saved = 0
        self.order = FEISTEL
        self._damaged: list[str] = []  # of rank 0

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        failed = self._writing and self._writing.exception()
        if error is None:
            self._context.agreed = True
            if failed:
                raise failed
        elif failed and failed is not error:
            self._context.warn(f"the last checkpoint was not written either: {line_of(failed)}")

    def resume(self) -> int:
        """Collective. Restore the newest intact checkpoint, else the one to continue from; the number of updates that
        its position makes, 0 if there is neither.

        Rank 0 chooses: a storage may not show the newest one to every node at once. A node downloads it once.
        """
        config, context = self._config, self._context
        found, error = None, None
        with ExitStack() as copies:
            if context.rank == 0:
                found, error = attempt(lambda: load_newest(config.output, context.warn, copies))
            agree(context, error)
            position = from_rank_0(context, found.state.facts["position"] if found else -1)
            own = join(config.output, "checkpoints", f"{position:012d}") if position >= 0 else None
            uri = own or config.continue_from
            if uri is None:
                return 0
            self._damaged = found.damaged if found else []
            state, error = attempt(lambda: self._checked(found.state if found else load_checkpoint(uri, copies), uri))
            agree(context, error)
        self._saved = state.facts["position"] // config.global_batch_size
        self.order = state.facts.get("order", SORTED)
        restore_engine(self._engine, self._optimizer, state.tensors, self._saved, averaged=config.ema is not None)
        if (critic := self._critic) is not None:
            restore_module(critic.module, critic.optimizer, state.tensors[critic.name], self._saved)
        return self._saved

    def _checked(self, state: TrainingState, uri: str) -> TrainingState:
        check_tensors(uri, state.tensors["weights"], self._engine.module.trained)
        if self._critic is not None:
            check_names(uri, state.tensors.get(self._critic.name, {}), self._critic.module, self._critic.name)
        if uri == self._config.continue_from:  # under a changed config
            return state
        before, now = (facts.get("dataset_ids") for facts in (state.facts, self._context.facts))
        if before and now and before != now:
            raise DataError(
                f"the checkpoint was trained on the datasets {', '.join(before)}, the config names {', '.join(now)}",
                where=uri,
                todo="give the same shards, or another `output` with this run's model as `init_from`",
            )
        return state

    def save(self, num_updates: int, validation: Mapping[str, float] | None = None) -> None:
        """Collective. Copy what a checkpoint holds, then write it in the background; at most one at a time.

        A write that fails is reported by `failure`, `wait` and the block's end; the next one is then not begun. Saving
        twice at one update does nothing. ModelError where a network or the critic differs from rank 0's.
        """
        if num_updates == self._saved:
            return
        self._saved = num_updates
        config, context = self._config, self._context
        if self._writing is not None:
            self._writing.exception()  # waits; what failed is raised by `failure`
        critic = self._critic and {self._critic.name: module_state(self._critic.module, self._critic.optimizer)}
        self._check_replicas(critic or {}, num_updates)
        tensors = engine_state(self._engine, self._optimizer, averaged=config.ema is not None, keep=context.rank == 0)
        if tensors is None:
            return
        tensors |= critic or {}
        position = num_updates * config.global_batch_size
        facts = {"position": position, "num_updates": num_updates, "order": self.order, **context.facts}
        if validation:
            facts["validation"] = dict(validation)
        failed = self.failure()
        if failed is None:
            self._writing = self._pool.submit(self._write, TrainingState(facts, tensors))

    def wait(self) -> None:
        """Collective. Wait until the last checkpoint is written; raises on every rank if that failed."""
        if self._writing is not None:
            self._writing.exception()  # waits
        agree(self._context, self.failure())

    def _check_replicas(self, critic: Mapping[str, Mapping[str, Tensor]], num_updates: int) -> None:
        tensors = {f"{part}.{name}": tensor for part, state in critic.items() for name, tensor in state.items()}
        for part, network in self._engine.module.model.networks.items():
            tensors |= {f"{part}.{name}": tensor for name, tensor in network.state_dict().items()}
        check_replicas(self._context, tensors, num_updates, self._config.output)

    def _write(self, state: TrainingState) -> None:
        runtime = self._config.runtime
        if "fingerprint" in state.facts:
            check_claim(self._config.output, state.facts["fingerprint"])
        save_checkpoint(
            self._config.output,
            state,
            keep=runtime.keep_checkpoints,
            damaged=self._damaged,
            best_by=self._config.best_by,
        )
        every = runtime.export_every * runtime.checkpoint_every
        if self._context.export and every and state.facts["num_updates"] % every == 0:
            place = join(self._config.output, "exports", f"{state.facts['position']:012d}")
            self._context.export(state.model_weights, place)

    def failure(self) -> CcsrError | None:
        """The user's error of a write that failed; any other error is raised."""
        if self._writing is None or not self._writing.done():
            return None
        error = self._writing.exception()
        if error is not None and not isinstance(error, CcsrError):
            raise error
        return error
