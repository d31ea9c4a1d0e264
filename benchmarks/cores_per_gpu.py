"""CPU cores of degradation that training needs for one GPU: CPU time measured here, the GPU's speed assumed.

OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/cores_per_gpu.py
"""

import statistics
from pathlib import Path

from infra.config import load_config
from training.config import TrainConfig
from training.run.cost.requirements import ingest_seconds, step_cost
from training.run.monitoring.meter import PEAK_FLOPS

CONFIGS = Path(__file__).parent.parent / "configs"
STAGES = ("ccsr_v2_stage0", "ccsr_v2_stage1", "ccsr_v1_stage1")
PRESETS = ("bicubic", "bsrgan", "ccsr", "realesrgan", "stablesr", None)
ROUNDS = 9
RAY = 19.1 / 13.1  # CPU of ingest by Ray's tasks over one process: benchmarks/ingest.md, warm
SHARES = {"H100": (0.2, 0.4), "A100": (0.4,)}  # of the dense bf16 peak; not measured


def main() -> None:
    config = load_config(CONFIGS / "ccsr_v2_stage1.yaml", TrainConfig)
    seconds = {
        preset: statistics.median(
            ingest_seconds(config.model_copy(update={"degradation": preset})) for _ in range(ROUNDS)
        )
        for preset in PRESETS
    }
    flops = {name: step_cost(load_config(CONFIGS / f"{name}.yaml", TrainConfig)).flops_per_sample for name in STAGES}
    for name, count in flops.items():
        print(f"{name}: {count / 1e12:.1f} TFLOP a sample")
    rates = {
        f"{card} at {share:.0%}": share * PEAK_FLOPS[card] / flops["ccsr_v2_stage1"]
        for card, shares in SHARES.items()
        for share in shares
    }
    head = ["degradation", "CPU ms a sample", *(f"{name}: {rate:.0f} samples/s" for name, rate in rates.items())]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for preset, cost in seconds.items():
        cells = [f"{cost * rate * RAY:.1f}" for rate in rates.values()]
        print(f"| {preset or 'stored LR'} | {cost * 1000:.1f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
