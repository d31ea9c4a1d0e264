"""8-bit AdamW: moments leave as float32 and come back as the same bytes; what it needs is said where it is missing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra import ConfigError
from infra.config import fingerprint_of, result_part
from infra.seeding import rng_for
from tests.training_runs import train_config
from training.optimizer import OptimizerConfig
from training.run.step import eight_bit
from training.run.step.eight_bit import (
    check_optimizer,
    float_moments,
    is_eight_bit,
    make_adamw8bit,
    optimizer_libraries,
    quantize_moments,
)

SETTINGS = OptimizerConfig(kind="adamw8bit", learning_rate=1e-2)


def trained(optimizer: torch.optim.Optimizer, weight: nn.Parameter, num_updates: int) -> None:
    rng = rng_for(0, "gradients")
    scale = torch.linspace(0, 3, weight.numel()) ** 4
    for _ in range(num_updates):
        weight.grad = scale * torch.from_numpy(rng.standard_normal(weight.numel(), dtype="float32"))
        optimizer.step()


def bytes_of(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in optimizer.state[weight].items() if name[:-1] in ("state", "absmax")}


def test_moments_come_back_as_the_same_bytes_wherever_their_largest_value_is() -> None:
    weight = nn.Parameter(torch.ones(5000))
    optimizer = make_adamw8bit([{"params": [weight]}], SETTINGS)
    plain, twin = nn.Parameter(torch.ones(5000)), None
    reference = torch.optim.AdamW([plain], lr=1e-2)
    assert is_eight_bit(optimizer)
    assert not is_eight_bit(reference)
    trained(optimizer, weight, 20)
    trained(reference, plain, 20)
    before = bytes_of(optimizer, weight)
    assert before["state1"].dtype == torch.uint8
    with float_moments(optimizer):
        moments = {kind: optimizer.state[weight][kind].clone() for kind in ("exp_avg", "exp_avg_sq")}
    assert not moments.keys() & optimizer.state[weight].keys()
    for kind, moment in moments.items():
        expected = reference.state[plain][kind]
        assert moment.dtype == torch.float32
        assert (moment - expected).norm() < 0.05 * expected.norm()

    twin = nn.Parameter(weight.detach().clone())
    again = make_adamw8bit([{"params": [twin]}], SETTINGS)
    again.state[twin] = dict(moments)
    quantize_moments(again, 20)
    after = bytes_of(again, twin)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert again.state[twin]["step"] == optimizer.state[weight]["step"] == 20
    blocks = moments["exp_avg"][: 5000 // 256 * 256].view(-1, 256)
    assert 2 < int((blocks.amin(1) < -blocks.amax(1)).sum()) < len(blocks) - 2, "of both signs"


def test_without_bitsandbytes_the_config_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert optimizer_libraries(SETTINGS) == ("bitsandbytes",)
    monkeypatch.setattr(eight_bit, "find_spec", lambda name: None)
    assert optimizer_libraries(SETTINGS) == optimizer_libraries(OptimizerConfig()) == (), "a finished run needs none"
    check_optimizer(OptimizerConfig())
    with pytest.raises(ConfigError, match="bitsandbytes") as caught:
        check_optimizer(SETTINGS)
    assert caught.value.where == "optimizer.kind"
    assert "ccsr-cluster[bnb]" in caught.value.todo


def test_it_is_part_of_what_a_result_depends_on() -> None:
    def fingerprint(**optimizer: Any) -> str:
        return fingerprint_of(result_part(train_config("d", "o", num_updates=1, optimizer=optimizer)))

    assert fingerprint(kind="adamw8bit") != fingerprint(kind="adamw") == fingerprint()


def test_blocks_that_begin_elsewhere_round_once_more() -> None:
    """As on another world size whose partitions are not of whole blocks."""
    weight = nn.Parameter(torch.ones(5000))
    optimizer = make_adamw8bit([{"params": [weight]}], SETTINGS)
    trained(optimizer, weight, 20)
    with float_moments(optimizer):
        moments = {kind: optimizer.state[weight][kind].clone() for kind in ("exp_avg", "exp_avg_sq")}
    for first, most in ((256, 0.0), (100, 0.02)):
        part = nn.Parameter(weight.detach()[first:].clone())
        other = make_adamw8bit([{"params": [part]}], SETTINGS)
        other.state[part] = {kind: moment[first:].clone() for kind, moment in moments.items()}
        quantize_moments(other, 20)
        with float_moments(other):
            for kind, moment in moments.items():
                error = (other.state[part][kind] - moment[first:]).norm() / moment[first:].norm()
                assert (error > 0) == (most > 0)
                assert error <= most, kind
