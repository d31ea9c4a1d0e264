"""The paper's orderings beside a result: which are stated, and when one holds, fails, is unclear or untested."""

import io
from pathlib import Path

import pytest
from result_folder import noisy, photographs, write_result
from rich.console import Console

from evaluation.report.orderings import Ordering, orderings_note, orderings_table, published_orderings
from evaluation.results import load_result

GROUP = "Table 4, RealSR"


@pytest.fixture(scope="module")
def orderings(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Ordering]:
    """`uniform` is the noisiest, as in the paper; `truncated` and `CCSR` are the wrong way round in L-STD."""
    methods = {"CCSR": (3, noisy(9)), "truncated": (3, noisy(5)), "uniform": (3, noisy(14)), "other": (3, noisy(1))}
    folder = write_result(tmp_path_factory.mktemp("r"), photographs(6), methods, run={"published": GROUP})
    found = published_orderings(load_result(folder), GROUP)
    return {(o.metric, o.better, o.worse): o for o in found}


def test_every_pair_of_neighbours_in_the_papers_ranking_is_stated(orderings: dict) -> None:
    expected = {
        ("psnr_y", "truncated", "CCSR"),  # 26.30, 26.24, 25.87
        ("psnr_y", "CCSR", "uniform"),
        ("lpips", "CCSR", "truncated"),
        ("lpips", "truncated", "uniform"),
        ("musiq", "uniform", "truncated"),
        ("musiq", "truncated", "CCSR"),
        ("g_std_psnr_y", "CCSR", "truncated"),
        ("g_std_psnr_y", "truncated", "uniform"),
        ("g_std_lpips", "CCSR", "truncated"),
        ("g_std_lpips", "truncated", "uniform"),
        ("g_std_musiq", "CCSR", "uniform"),  # 2.2287, 2.3880, 2.5185
        ("g_std_musiq", "uniform", "truncated"),
        ("l_std", "CCSR", "truncated"),
        ("l_std", "truncated", "uniform"),
    }
    assert set(orderings) == expected


def test_verdicts(orderings: dict) -> None:
    holds, fails = orderings["l_std", "truncated", "uniform"], orderings["l_std", "CCSR", "truncated"]
    assert (holds.verdict, fails.verdict) == ("holds", "fails")
    assert holds.low <= holds.mean <= holds.high < 0 < fails.low <= fails.mean <= fails.high
    assert (holds.published_better, holds.published_worse, holds.num_images) == (0.0226, 0.0246, 6)
    assert orderings["psnr_y", "CCSR", "uniform"].verdict == "holds"
    for metric in ("lpips", "musiq"):  # nobody has them here
        found = [o for (name, *_), o in orderings.items() if name == metric]
        assert {(o.verdict, o.mean) for o in found} == {("not tested", None)}


def test_equal_methods_are_unclear(tmp_path: Path) -> None:
    same = {"CCSR": (2, lambda bicubic, rng: bicubic), "uniform": (2, lambda bicubic, rng: bicubic)}
    folder = write_result(tmp_path, photographs(2), same)
    (found,) = [o for o in published_orderings(load_result(folder), GROUP) if o.metric == "psnr_y"]
    assert (found.verdict, found.mean) == ("unclear", 0)


def test_stability_of_runs_that_never_differ_is_not_tested(tmp_path: Path) -> None:
    methods = {"CCSR": (3, noisy(5)), "truncated": (1, noisy(5)), "uniform": (3, lambda bicubic, rng: bicubic)}
    found = published_orderings(load_result(write_result(tmp_path, photographs(3), methods)), GROUP)
    assert {o.verdict for o in found if o.metric in ("l_std", "g_std_psnr_y")} == {"not tested"}
    assert {o.verdict for o in found if o.metric == "psnr_y"} != {"not tested"}


def test_shown_in_terminal_and_report(orderings: dict) -> None:
    rows = [ordering.to_dict() for ordering in orderings.values()]
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(orderings_table(rows, GROUP))
    text = console.export_text()
    fails = orderings["l_std", "CCSR", "truncated"]
    for expected in (GROUP, "CCSR (0.0218) before truncated (0.0226)", f"{fails.mean:+.4f}", "fails", "not tested"):
        assert expected in text
        assert expected == GROUP or expected in orderings_table(rows, GROUP).html()
    assert orderings_note(rows).startswith("14 orderings of the paper: ")
