"""`ccsr estimate`: the micro-batch with which a training config fits cards of 24, 40 and 80 GB, and by which switch."""

from itertools import compress, product
from typing import TYPE_CHECKING

from infra.display.table import Cell, Table, cell
from training.config import TrainConfig

if TYPE_CHECKING:
    from training.run.cost.requirements import StepCost

CARDS_GIB = (24, 40, 80)
USABLE = 0.9
SWITCHES = ("activation_checkpointing", "optimizer.kind: adamw8bit", "offload_optimizer")


def fit_table(config: TrainConfig, counted: "StepCost | None" = None) -> Table:
    """A row for each choice of `SWITCHES`: bytes on one GPU by `step_cost`, and for each card the largest micro-batch,
    up to the config's, that fits. Where the result depends on it, the config's or none. `counted`: the
    config's own step cost, where it is known."""
    from training.run.cost.requirements import GIB, memory_needed, step_cost

    largest = config.runtime.micro_batch_size
    sizes = [n for n in range(largest, 0, -1) if config.global_batch_size % n == 0]
    sizes = sizes[:1] if config.runtime_in_result() else sizes
    table = Table(
        ("with", "GPU memory, GiB", *(f"{card} GB" for card in CARDS_GIB)),
        f"one GPU: largest micro-batch that fits (config: {largest}), {config.precision}",
        [
            f"counted, not measured: weights, gradients, optimiser state, what a forward keeps; {1 - USABLE:.0%} of a "
            "card are left for a step's temporaries and the driver"
            + ("; without LPIPS, and a PatchGAN in DINO's place" if config.learns_images else "")
        ],
    )

    def switched(kind: str = config.optimizer.kind, **switches: object) -> TrainConfig:
        optimizer = config.optimizer.model_copy(update={"kind": kind})
        return config.model_copy(update={"optimizer": optimizer, "runtime": config.runtime.model_copy(update=switches)})

    costs = {config.runtime.activation_checkpointing: counted or step_cost(config)}
    other = not config.runtime.activation_checkpointing
    costs[other] = step_cost(switched(activation_checkpointing=other))
    moments = (("adamw", False), ("adamw8bit", False), ("adamw", True))  # offloaded ones are in no GPU's memory
    for again, (kind, offload) in product((False, True), moments):
        zero_stage = max(int(offload), config.runtime.zero_stage)
        one = switched(kind, activation_checkpointing=again, offload_optimizer=offload, zero_stage=zero_stage)
        cost = costs[again]
        held = sum(memory_needed(cost.num_trained, cost.num_frozen, one, 1).values()) + cost.critic_bytes
        # Between two updates, without activations, a checkpoint has the 8-bit moments in float32.
        saved = 8 * cost.num_trained if kind == "adamw8bit" and not offload else 0
        totals = {size: (held + max(cost.activation_bytes * size // largest, saved)) / GIB for size in sizes}
        fits = (next((n for n, total in totals.items() if total <= USABLE * card), None) for card in CARDS_GIB)
        chosen = compress(SWITCHES, (again, kind == "adamw8bit", offload))
        names = " + ".join(chosen) or "none of the three below"
        cells = (Cell(size, ((str(size), "good") if size else ("no", "bad"),)) for size in fits)
        table.add(names, cell(totals[largest], ".1f"), *cells)
    return table
