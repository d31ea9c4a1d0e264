"""FLOPs that are counted, and a share of the peak only where there is a peak."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import training.run.monitoring.meter
from infra.config import parse_config
from training.config import TrainConfig
from training.run.monitoring.meter import Meter, flop_counter, peak_flops


def meter(device: str = "cpu", **runtime: object) -> Meter:
    values = {
        "job": "train",
        "init_from": "random",
        "output": "out",
        "stage": 1,
        "data": ["data"],
        "num_updates": 1,
        "precision": "bf16",
    }
    values |= {"global_batch_size": 8, "runtime": {"micro_batch_size": 4, **runtime}}
    return Meter(parse_config(values, TrainConfig, where="test"), device, world_size=2)


def test_counts_products_convolutions_and_attention_forward_and_backward() -> None:
    linear, convolution = nn.Linear(8, 16), nn.Conv2d(3, 5, 3, padding=1)
    query = torch.rand(2, 4, 7, 16, requires_grad=True)
    with flop_counter() as counter:
        nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    attention = counter.get_total_flops()
    product = 2 * 2 * 4 * 7 * 7 * 16  # one of the two matrix products of a forward; the backward makes five
    assert attention == 7 * product
    with flop_counter() as counter:
        linear(torch.rand(10, 8, requires_grad=True)).sum().backward()
        convolution(torch.rand(2, 3, 6, 6, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 8 * 16 + 3 * 2 * (2 * 6 * 6) * 5 * 3 * 9


def test_counts_once_and_again_when_the_loss_gets_another_term() -> None:
    counted = meter()
    small, large = torch.rand(4, 4), torch.rand(8, 8)
    rates = []
    for terms, factor in (({"a"}, small), ({"a"}, large), ({"a", "b"}, large), ({"a", "b"}, large)):
        counted.batch_arrived()
        for micro_step in range(2):
            with counted.counting(micro_step):
                factor @ factor
        counted.update_done(dict.fromkeys(terms, 1.0))
        rates.append(counted.flops_per_sample)
        counted.wait_for_batch()
    # 2 n^3 by a micro-batch of 4; the update that first has the new term is still on the old count
    assert rates == [32, 32, 32, 256]


def test_a_given_count_is_kept() -> None:
    config = meter().config
    given = Meter(config, "cpu", world_size=2, flops_per_sample=7.0)
    for terms in ({"a": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}):
        with given.counting(0):
            torch.rand(4, 4) @ torch.rand(4, 4)
        given.update_done(terms)
    assert given.flops_per_sample == 7.0


def test_rates_leave_validation_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 10.0, 14.0, 20.0, 20.0, 24.0, 24.0])
    monkeypatch.setattr(training.run.monitoring.meter, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    measured = meter()  # reads 0
    measured.batch_arrived()  # 1: one second of waiting
    with measured.counting(0):
        torch.rand(100, 100) @ torch.rand(100, 100)
    measured.update_done({"loss": 1.0})
    with measured.aside():  # 4 to 10
        pass
    values = measured.values()  # 14: 8 seconds of training
    assert values["samples_per_second"] == 1
    assert values["samples_per_second_per_worker"] == 0.5
    assert values["data_wait_share"] == 1 / 8
    assert values["validation_seconds"] == 6
    assert values["tflops_per_second_per_worker"] == pytest.approx(2e6 / 4 * 0.5 / 1e12)
    assert values["peak_memory_gib"] > 0.1
    assert not {"mfu", "hfu"} & values.keys()  # a CPU has no peak to compare with
    assert "validation_seconds" not in measured.values()


def test_peak_memory_of_a_gpu_is_that_of_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card whose peak is 5 GiB before the loop, 3 in the first interval, 1 in the second."""
    peak, allocated = 5, 0

    def reset(device: str) -> None:
        nonlocal peak
        peak = allocated

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: peak * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    measured = meter(device="cuda:0")
    seen = []
    for interval in (3, 1):
        peak = max(peak, interval)
        seen.append(measured.values()["peak_memory_gib"])
    assert seen == [3, 1]


@pytest.mark.parametrize(("checkpointing", "name"), [(False, "mfu"), (True, "hfu")])
def test_share_of_the_peak_where_it_is_known(checkpointing: bool, name: str) -> None:
    measured = meter(activation_checkpointing=checkpointing)
    measured.peak = peak_flops("NVIDIA H200")
    with measured.counting(0):
        torch.rand(100, 100) @ torch.rand(100, 100)
    measured.update_done({"loss": 1.0})
    time.sleep(0.01)
    values = measured.values()
    assert values[name] == pytest.approx(values["tflops_per_second_per_worker"] * 1e12 / 989e12)
    assert len({"mfu", "hfu"} & values.keys()) == 1


def test_cards_by_the_name_that_the_driver_gives() -> None:
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "Tesla V100-SXM2", "NVIDIA L40S"]
    assert [peak_flops(name) for name in names] == [989e12, 756e12, 312e12, 125e12, 362e12]
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    names = ["NVIDIA GB200", "NVIDIA GH200 480GB", "NVIDIA B200", "NVIDIA L4", "NVIDIA A10", "NVIDIA GeForce RTX 5090"]
    assert [peak_flops(name) for name in names] == [2500e12, 989e12, 2250e12, 121e12, 125e12, 209e12]
    assert [peak_flops(name) for name in ("NVIDIA RTX A1000", "NVIDIA L40", "NVIDIA A10G")] == [None] * 3
    assert peak_flops("NVIDIA GeForce GTX 1650") is None
