"""The DeepSpeed engine of one worker: fp32 masters, gradients accumulated and reduced in fp32, state by name."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from infra.process.imports import without
from training.config import TrainConfig
from training.models.library import BasicTransformerBlock
from training.run.checkpoint import ADAM_MOMENTS, EMA, step_tensor
from training.run.step.eight_bit import float_moments, is_eight_bit, make_adamw8bit, quantize_moments
from training.run.step.stages import Stage


def load_deepspeed() -> Any:
    """DeepSpeed, imported first here: without MLflow, which its autotuner would load, a second of each worker; without
    its compiled shared-memory collectives, since a machine without a compiler must do; and without the memory tables
    that its bf16 optimizer prints, each after a garbage collection (1.7 s of rank 0 for a tiny model)."""
    with without("mlflow", importing="deepspeed"):
        import deepspeed.ops
        import deepspeed.runtime.bf16_optimizer

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
    return deepspeed


def make_engine(stage: Stage, config: TrainConfig, world_size: int, device: str) -> tuple[Any, torch.optim.Optimizer]:
    """Move an fp32 `stage` to `device` in the networks' dtype and wrap it; collective. Its AdamW comes second.

    The fp32 masters are the weights before they are rounded to that dtype.
    """
    import deepspeed

    bf16 = config.precision == "bf16"
    weights = {name: p.detach().clone() for name, p in stage.trained.named_parameters()} if bf16 else {}
    stage.model.to(device, torch.bfloat16 if bf16 else torch.float32)
    prepare_networks(stage, config)
    settings = config.optimizer
    trained = [p for p in stage.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained}]
    if settings.no_decay:
        norms_and_biases = [p for p in trained if p.ndim < 2]
        groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": norms_and_biases, "weight_decay": 0.0}]
    if settings.kind == "adamw8bit":
        optimizer = make_adamw8bit(groups, settings)
    else:
        optimizer = torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=device.startswith("cuda"),
        )
    accumulation = config.global_batch_size // (config.runtime.micro_batch_size * world_size)
    zero: dict[str, Any] = {"stage": config.runtime.zero_stage}
    if config.runtime.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.startswith("cuda")}
    engine, *_ = deepspeed.initialize(
        model=stage,
        optimizer=optimizer,
        config={
            "train_batch_size": config.global_batch_size,
            "train_micro_batch_size_per_gpu": config.runtime.micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": settings.clip_norm,
            "bf16": {"enabled": bf16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": zero,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    if bf16:
        _set_weights(engine, weights)
    return engine, optimizer


def prepare_networks(stage: Stage, config: TrainConfig) -> None:
    """`runtime.channels_last`, of frozen weights: DeepSpeed broadcasts and partitions trained ones in C order.
    `runtime.compile`: the blocks that a network repeats, each size once, in place of a whole network of many sizes."""
    for network in stage.model.networks.values() if config.runtime.channels_last else ():
        for weight in network.parameters():
            if weight.ndim == 4 and not weight.requires_grad:
                weight.data = weight.data.to(memory_format=torch.channels_last)
    if not config.runtime.compile:
        return
    torch._dynamo.config.recompile_limit = 64  # sizes of all networks, with and without gradients; torch's default is 8
    for block in (block for network in stage.model.computing for block in network.modules()):
        if isinstance(block, BasicTransformerBlock):
            block.compile()


def step(engine: Any) -> Tensor | float | None:
    """Update the weights if this micro-step is the last of its update; the gradient's global norm before clipping then.

    A norm that is not finite comes back as such, the same on all ranks; the weights are of no use afterwards.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    if _is_partitioned(engine):
        engine.step()
        if engine.global_steps == 1:  # DeepSpeed links after the first group's step, when the others have no state
            _link_state(engine)
        return engine.get_global_grad_norm()
    # DeepSpeed keeps no norm under ZeRO 0, and what `step` leaves of the gradients is zero.
    norm = nn.utils.get_total_norm([p.grad for p in engine.module.trained.parameters() if p.grad is not None])
    engine.step()
    return norm


@torch.no_grad()
def update_average(engine: Any, optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Move the average, a state of the optimiser's float32 weights, towards them; on the part that this rank holds.

    It begins as these weights; DeepSpeed's copies in the networks' dtype would lose most of a step.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    states = [optimizer.state[weight] for weight in weights]
    if EMA in states[0]:
        torch._foreach_lerp_([state[EMA] for state in states], weights, 1 - decay)
        return
    for state, weight in zip(states, weights, strict=True):
        state[EMA] = weight.clone()
    _link_state(engine)


@contextmanager
def averaged(engine: Any, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Collective. Inside the block the networks hold the average, in their dtype."""
    parameters = list(engine.module.trained.parameters())
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data.copy_(_full_state(engine, optimizer, parameter, EMA))
        yield
    finally:
        for parameter, weight in zip(parameters, kept, strict=True):
            parameter.data.copy_(weight)


def engine_state(
    engine: Any, optimizer: torch.optim.Optimizer, *, averaged: bool = False, keep: bool = True
) -> dict[str, dict[str, Tensor]] | None:
    """Parameters, moments and, where they are `averaged`, the average by name: full fp32 copies on the CPU.

    Collective: every rank calls it. A rank that does not `keep` them holds one tensor at a time and returns None; of
    8-bit moments each rank meanwhile holds its own in float32 too.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    files = ("weights", "moments", EMA) if averaged else ("weights", "moments")
    tensors: dict[str, dict[str, Tensor]] = {file: {} for file in files}
    with _moments(engine, optimizer):
        for name, parameter in engine.module.trained.named_parameters():
            full = safe_get_full_fp32_param(parameter) if _is_partitioned(engine) else parameter
            if keep:
                tensors["weights"][name] = _copy(full)
            for kind in (*ADAM_MOMENTS, EMA) if averaged else ADAM_MOMENTS:
                full = _full_state(engine, optimizer, parameter, kind)
                if keep:
                    file, key = (EMA, name) if kind == EMA else ("moments", f"{kind}.{name}")
                    tensors[file][key] = _copy(full)
    return tensors if keep else None


def restore_engine(
    engine: Any,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Mapping[str, Tensor]],
    num_updates: int,
    *,
    averaged: bool = False,
) -> None:
    """Put `engine_state`'s tensors back into an engine of any world size and ZeRO stage, before its first step.

    Where they are `averaged` from here on and the tensors hold no average, it begins at the next update.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    kinds = (*ADAM_MOMENTS, EMA) if averaged and EMA in tensors else ADAM_MOMENTS
    partitioned = _is_partitioned(engine)
    if partitioned:
        for group in optimizer.param_groups:  # DeepSpeed put its flat partitions there
            for flat in group["params"]:
                state = {kind: torch.zeros_like(flat) for kind in kinds}
                optimizer.state[flat] = {"step": step_tensor(optimizer, flat, num_updates), **state}
        _link_state(engine)
    for name, parameter in engine.module.trained.named_parameters():
        saved = {kind: tensors[EMA][name] if kind == EMA else tensors["moments"][f"{kind}.{name}"] for kind in kinds}
        state = {kind: tensor.to(parameter.device) for kind, tensor in saved.items()}
        if partitioned:
            for kind in kinds:
                safe_set_full_optimizer_state(parameter, state[kind], kind)
        else:
            optimizer.state[parameter] = {"step": step_tensor(optimizer, parameter, num_updates), **state}
    if is_eight_bit(optimizer):
        quantize_moments(optimizer, num_updates)
        _link_state(engine)
    _set_weights(engine, tensors["weights"])


@contextmanager
def _moments(engine: Any, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the block the optimiser's states hold AdamW's moments in float32."""
    if not is_eight_bit(optimizer):
        yield
        return
    with float_moments(optimizer):
        _link_state(engine)
        yield
    _link_state(engine)


def _set_weights(engine: Any, weights: Mapping[str, Tensor]) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    partitioned = _is_partitioned(engine)
    for name, parameter in engine.module.trained.named_parameters():
        weight = weights[name].to(parameter.device)
        if partitioned:
            safe_set_full_fp32_param(parameter, weight)
        else:
            parameter.data.copy_(weight)
    if partitioned:
        engine.optimizer.update_lp_params()


def _is_partitioned(engine: Any) -> bool:
    """Whether DeepSpeed holds masters and moments in flat partitions; under ZeRO 0 the plain optimiser holds them."""
    return engine.zero_optimization_stage() > 0


def _link_state(engine: Any) -> None:
    """Let the parameters find their parts of the optimiser's state anew: DeepSpeed looks once, at the first step."""
    if _is_partitioned(engine):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _full_state(engine: Any, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kind: str) -> Tensor:
    """Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if _is_partitioned(engine):
        return safe_get_full_optimizer_state(parameter, kind)
    return optimizer.state[parameter][kind]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
