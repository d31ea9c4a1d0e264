"""Comparison of results: differences, intervals, wins and losses, config diff, refusals."""

import csv
import io
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from result_folder import noisy, photographs, write_result
from rich.console import Console

from evaluation.compare import Comparison, Difference, compare
from evaluation.find import merge_results
from evaluation.metrics.bootstrap import bootstrap_interval
from evaluation.mlflow_results import method_metrics
from evaluation.report.tables import interval_table, table_notes, table_rows
from evaluation.results import load_result
from infra import ConfigError, DataError, rng_for
from infra.mlflow.server import TrackingConfig

KEYS = [f"img{i}" for i in range(6)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base, hr = tmp_path_factory.mktemp("runs"), photographs(6)
    first = {"bicubic": (1, lambda bicubic, rng: bicubic), "ccsr": (3, noisy(5))}
    a = write_result(base / "a", hr, first, run={"config": {"seed": 0, "model": {"t_max": 0.66, "steps": 15}}})
    b = write_result(
        base / "b", hr, {"ccsr": (3, noisy(14))}, seed=7, run={"config": {"seed": 0, "model": {"steps": 15}}}
    )
    return a, b


def find(comparison: Comparison, candidate: str, metric: str) -> Difference:
    (found,) = [d for d in comparison.differences if (d.candidate, d.metric) == (candidate, metric)]
    return found


def test_differences_are_paired_by_image(folders: tuple[Path, Path]) -> None:
    a, b = folders
    comparison = compare([f"{a}:ccsr", b])
    psnr = find(comparison, "b:ccsr", "psnr_y")
    ours, theirs = (load_result(folder).methods["ccsr"].scores["psnr_y"].mean(axis=1) for folder in (a, b))
    np.testing.assert_allclose(psnr.differences, theirs - ours, atol=1e-12)
    assert psnr.keys == KEYS
    assert psnr.mean == pytest.approx(psnr.candidate_mean - psnr.baseline_mean, abs=1e-12)
    assert (psnr.wins, psnr.losses, psnr.verdict) == (0, 6, "worse")
    assert psnr.low < psnr.mean < psnr.high < 0
    stability = find(comparison, "b:ccsr", "l_std")
    assert (stability.direction, stability.wins, stability.losses, stability.verdict) == (-1, 0, 6, "worse")
    assert stability.low > 0
    assert find(comparison, "b:ccsr", "g_std_psnr_y").direction == -1
    assert find(comparison, "b:ccsr", "sharpness").direction == 0
    worst = stability.worse_images()
    assert [value for _, value in worst] == sorted((value for _, value in worst), reverse=True)


def test_a_result_against_itself_differs_by_exactly_0(folders: tuple[Path, Path]) -> None:
    comparison = compare([f"{folders[0]}:ccsr", f"{folders[0]}:ccsr"])
    assert comparison.baseline == "a:ccsr #1"
    assert {d.candidate for d in comparison.differences} == {"a:ccsr #2"}
    for difference in comparison.differences:
        assert not difference.differences.any()
        assert (difference.low, difference.high, difference.wins, difference.losses) == (0, 0, 0, 0)
        assert difference.verdict == ("" if difference.metric == "sharpness" else "unclear")
    assert comparison.config_diff == {}
    assert len(comparison.tables()) == 1


def test_the_baseline_is_the_first_method_with_runs_unless_one_is_named(folders: tuple[Path, Path]) -> None:
    """A deterministic method's spread over its runs is no number to be better or worse than."""
    comparison = compare([*folders])
    assert comparison.baseline == "a:ccsr"
    assert list(dict.fromkeys(d.candidate for d in comparison.differences)) == ["a:bicubic", "b:ccsr"]
    by_string = compare([load_result(folders[0]), str(folders[1])])
    assert [d.mean for d in by_string.differences] == [d.mean for d in comparison.differences]
    named = compare([f"{folders[0]}:bicubic", folders[1]])
    assert named.baseline == "a:bicubic"
    over_runs = {"l_std", "l_std_equal_sharpness", "g_std_psnr_y", "g_std_ssim_y"}
    for differences, candidate in ((comparison.differences, "a:bicubic"), (named.differences, "b:ccsr")):
        metrics = {d.metric for d in differences if d.candidate == candidate}
        assert metrics.isdisjoint(over_runs)
        assert metrics >= {"psnr_y", "sharpness"}
    assert {d.metric for d in comparison.differences if d.candidate == "b:ccsr"} >= over_runs


def test_a_metric_that_nobody_has_gives_no_row(folders: tuple[Path, Path]) -> None:
    assert not [d for d in compare([*folders]).differences if "lpips" in d.metric]


def test_config_diff_names_dotted_keys(folders: tuple[Path, Path]) -> None:
    a, b = folders
    assert compare([f"{a}:ccsr", b]).config_diff == {"model.t_max": {"a:ccsr": 0.66, "b:ccsr": "(not set)"}}


def test_config_diff_is_of_the_compared_methods_alone(tmp_path: Path) -> None:
    folders = [
        write_result(tmp_path / name, photographs(1), {"m": (2, noisy(5))}, method_config={"steps": steps})
        for name, steps in (("a", 4), ("b", 6))
    ]
    assert compare(folders).config_diff == {"method.steps": {"a:m": 4, "b:m": 6}}


def test_interval_is_seeded_and_chunks_change_nothing() -> None:
    differences = rng_for(0, "d").normal(0.3, 1, 50)
    assert bootstrap_interval(differences) == bootstrap_interval(differences)
    assert bootstrap_interval(differences, seed=1) != bootstrap_interval(differences)
    rng = rng_for(0, "bootstrap")
    means = [differences[rng.integers(50, size=50)].mean() for _ in range(10_000)]
    assert bootstrap_interval(differences) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=1e-12)
    many = rng_for(0, "many").normal(0, 1, 3000)  # more than one chunk
    low, high = bootstrap_interval(many, num_resamples=4000)
    assert high - low == pytest.approx(2 * 1.96 * many.std() / np.sqrt(3000), rel=0.1)


def test_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    inside = 0
    for i in range(200):
        low, high = bootstrap_interval(rng_for(i, "sample").normal(0.5, 1, 60), num_resamples=1000)
        inside += low <= 0.5 <= high
    assert 180 <= inside <= 199


def test_unlike_numbers_of_runs_do_not_compare_stability(tmp_path: Path) -> None:
    hr = photographs(2)
    few, many = (write_result(tmp_path / str(n), hr, {"m": (n, noisy(5))}) for n in (2, 4))
    comparison = compare([few, many])
    assert {d.metric for d in comparison.differences} == {"psnr_y", "ssim_y", "sharpness"}
    assert "4 runs against 2" in comparison.notes[0]


def same(bicubic: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return bicubic


def test_runs_that_never_differ_win_no_stability(tmp_path: Path) -> None:
    """A one-step model, or another tool's equal outputs: 0 by construction, however many there are."""
    folder = str(write_result(tmp_path, photographs(3), {"onestep": (3, same), "ccsr": (3, noisy(5))}))
    comparison = compare([folder])
    assert comparison.baseline.endswith(":ccsr")
    assert {d.metric for d in comparison.differences} == {"psnr_y", "ssim_y", "sharpness"}
    assert "it is deterministic, so stability over runs is not compared" in comparison.notes[0]
    summary = load_result(folder).summary
    assert method_metrics(summary["onestep"]).keys() == {"num_blurrier", "sharpness", "psnr_y", "ssim_y"}
    assert method_metrics(summary["ccsr"]).keys() >= {"l_std", "l_std_equal_sharpness", "psnr_y.g_std"}
    rows = dict(table_rows(summary | {"other": summary["ccsr"] | {"l_std": 0.5}}))
    assert [cell[0].rank for cell in rows["↓ L-STD / sharpness"]] == [0, 1, 2]
    assert "not ranked: onestep" in " ".join(table_notes(summary))
    assert "L-STD" not in interval_table({"onestep": load_result(folder).methods["onestep"]}).html()


def test_a_method_blurrier_on_some_images_is_not_compared_at_equal_sharpness(tmp_path: Path) -> None:
    """The images that remain would flatter it."""
    hr, sharp = photographs(3), noisy(9, 1.5)
    first = iter([True] * 3)

    def mostly_blurred(bicubic: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return sharp(bicubic, rng) if next(first, False) else cv2.GaussianBlur(bicubic, (0, 0), 3) + rng.normal(0, 0.4)

    folder = str(write_result(tmp_path, hr, {"sharp": (3, sharp), "blurred": (3, mostly_blurred)}))
    comparison = compare([folder])
    assert "l_std" in {d.metric for d in comparison.differences}
    assert "l_std_equal_sharpness" not in {d.metric for d in comparison.differences}
    assert "blurrier than bicubic on 2 of 3 images" in comparison.notes[0]
    summary = load_result(folder).summary["blurred"]
    assert summary["l_std_equal_sharpness"] is not None
    assert "l_std_equal_sharpness" not in method_metrics(summary)
    assert "equal sharpness" not in interval_table({"blurred": load_result(folder).methods["blurred"]}).html()


def test_other_perturbations_are_neither_compared_nor_merged(tmp_path: Path) -> None:
    places = []
    for names in (["shift"], ["shift", "jpeg"]):
        config = {"config": {"perturbations": names}}
        place = write_result(tmp_path / str(len(names)), photographs(2), {"m": (2, noisy(5))}, run=config)
        table = pq.read_table(place / "images.parquet")
        column = table.schema.get_field_index("p_std")
        pq.write_table(table.set_column(column, "p_std", pa.array([0.1] * 2)), place / "images.parquet")
        places.append(place)
    comparison = compare(places)
    assert "p_std" not in {d.metric for d in comparison.differences}
    assert "other perturbations" in comparison.notes[0]
    assert "p_std" in {d.metric for d in compare([places[0], places[0]]).differences}
    with pytest.raises(DataError, match="their perturbations of the input differ"):
        merge_results([load_result(place) for place in places])
    without = write_result(tmp_path / "without", photographs(2), {"m": (2, noisy(5))})
    for pair in ([without, places[0]], [places[0], without]):
        merged = merge_results([load_result(place) for place in pair])
        assert sorted(np.isfinite(method.p_std).all() for method in merged.methods.values()) == [False, True]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"dataset_id": "set-2"}, "dataset_id differs"),
        ({"convention": "pyiqa"}, "convention differs"),
    ],
)
def test_unlike_test_sets_are_refused(run: dict, expected: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_result(tmp_path / "c", photographs(6), {"ccsr": (2, noisy(5))}, run=run)
    with pytest.raises(DataError, match=expected) as caught:
        compare([folders[1], other])
    assert "b:ccsr has" in caught.value.where
    assert repr(next(iter(run.values()))) in caught.value.where


def test_unknown_test_sets_are_refused(tmp_path: Path) -> None:
    unnamed = write_result(tmp_path, photographs(1), {"m": (2, noisy(5))}, run={"dataset_id": None})
    with pytest.raises(DataError, match="dataset_id differs or is unknown"):
        compare([f"{unnamed}:m", f"{unnamed}:m"])


def test_unlike_images_are_refused_and_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fewer = write_result(tmp_path / "c", photographs(6), {"ccsr": (3, noisy(5))}, keys=KEYS[:-2])
    with pytest.raises(DataError, match="images differ") as caught:
        compare([folders[1], fewer])
    assert caught.value.where == "only b:ccsr has 2 (img4, img5)"


def test_unknown_methods_and_single_results_are_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="no method 'ccrs'") as caught:
        compare([f"{folders[0]}:ccrs", folders[1]])
    assert caught.value.todo == "choose one of bicubic, ccsr"
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare([folders[1]])


def test_terminal_and_csv_say_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    comparison = compare([f"{folders[0]}:ccsr", folders[1]])
    psnr = find(comparison, "b:ccsr", "psnr_y")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*comparison.tables())
    text = console.export_text()
    for expected in (
        "b:ccsr against a:ccsr",
        f"{psnr.mean:+.4f}",
        f"{psnr.low:+.4f} .. {psnr.high:+.4f}",
        "↑ psnr_y",
        "↓ l_std",
        "worse in psnr_y: img",
        "model.t_max",
        "(not set)",
    ):
        assert expected in text
    comparison.write_csv(tmp_path / "c.csv")
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    of_psnr = [row for row in rows if row["metric"] == "psnr_y"]
    assert [row["image"] for row in of_psnr] == ["", *KEYS]
    assert float(of_psnr[0]["difference"]) == psnr.mean
    assert (of_psnr[0]["losses"], of_psnr[0]["verdict"]) == ("6", "worse")
    assert float(of_psnr[3]["difference"]) == psnr.differences[2]
    assert {row["verdict"] for row in of_psnr[1:]} == {"worse"}


def test_a_name_without_a_database_is_refused_and_makes_none(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with pytest.raises(DataError, match="'run-a' is no result folder, and there is no MLflow database"):
        compare(["run-a", "run-b"], tracking=TrackingConfig(uri=f"sqlite:///{database}"))
    assert not database.exists()
