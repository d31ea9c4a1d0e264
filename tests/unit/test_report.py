"""The result folder's reader and summary, the paper's table, and the HTML report."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from result_folder import noisy, photographs, write_result
from rich.console import Console
from typer.testing import CliRunner

from evaluation import l_std, psnr_y
from evaluation.find import merge_results
from evaluation.report.page import write_report
from evaluation.report.plots import trace_plots
from evaluation.report.tables import interval_table, published_summary, score_table, table_rows
from evaluation.results import image_row, load_result, method_scores
from infra import ConfigError, DataError, StorageError
from infra.imaging.images import read_image
from pipelines.cli.main import app

METHODS = {"bicubic": (1, lambda bicubic, rng: bicubic), "ccsr": (3, noisy(4)), "<other>": (3, noisy(15, 1.5))}


def summarise(results: pa.Table, images: pa.Table) -> dict[str, dict]:
    return {name: method.summary() for name, method in method_scores(results, images).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_result(tmp_path_factory.mktemp("eval"), photographs(3), METHODS)


def without(table: pa.Table, **cell: object) -> pa.Table:
    keep = np.ones(table.num_rows, bool)
    for column, value in cell.items():
        keep &= np.array(pc.equal(table[column], value))
    return table.filter(pa.array(~keep))


def tables(folder: Path) -> tuple[pa.Table, pa.Table]:
    return pq.read_table(folder / "results.parquet"), pq.read_table(folder / "images.parquet")


def test_intervals_are_of_the_images_and_only_of_what_varies(folder: Path) -> None:
    result = load_result(folder)
    table = interval_table({name: result.methods[name] for name in ("bicubic", "ccsr")}).html()
    rows = dict(re.findall(r"<tr><th>([^<]+)</th>(.*?)</tr>", table))
    assert list(rows) == ["psnr_y", "G-STD of psnr_y", "ssim_y", "G-STD of ssim_y", "L-STD", "L-STD at equal sharpness"]
    assert [rows[name].startswith("<td></td><td>") for name in rows] == [False, True, False, True, True, True]
    *_, mean, low, high = (float(text) for text in re.findall(r"\d+\.\d+", rows["psnr_y"]))
    scores = result.methods["ccsr"].scores["psnr_y"].mean(axis=1)
    assert mean == pytest.approx(scores.mean(), abs=1e-4)
    assert scores.min() - 1e-4 <= low < mean < high <= scores.max() + 1e-4


def test_summary_is_what_the_pictures_say(folder: Path) -> None:
    summary = load_result(folder).summary["ccsr"]
    images = [folder / "images" / "ccsr" / f"{run:02d}" for run in range(3)]
    psnr, stability = [], []
    for key in ("img0", "img1", "img2"):
        hr = read_image(str(folder / "images" / "hr" / f"{key}.png"))
        runs = [read_image(str(image / f"{key}.png")) for image in images]
        psnr.append([psnr_y(run, hr) for run in runs])
        stability.append(l_std(runs))
    assert summary["num_images"] == 3
    assert summary["num_runs"] == 3
    assert summary["metrics"]["psnr_y"]["mean"] == pytest.approx(np.mean(psnr), abs=1e-12)
    assert summary["metrics"]["psnr_y"]["g_std"] == pytest.approx(np.std(psnr, axis=1).mean(), abs=1e-12)
    assert summary["l_std"] == pytest.approx(np.mean(stability), abs=1e-15)


def test_a_deterministic_method_has_exactly_0_stability(folder: Path) -> None:
    summary = load_result(folder).summary["bicubic"]
    assert summary["l_std"] == 0.0
    assert summary["metrics"]["psnr_y"]["g_std"] == 0.0
    assert summary["metrics"]["psnr_y"]["mean"] > 10


def test_an_unavailable_metric_is_no_number(folder: Path) -> None:
    for method in load_result(folder).summary.values():
        assert method["metrics"]["lpips"] == {"mean": None, "g_std": None, "num_images": 0}


def test_a_metric_that_one_image_lacks_is_averaged_over_the_others(folder: Path) -> None:
    results, images = tables(folder)
    lacking = (np.array(results["key"]) == "img1") & (np.array(results["method"]) == "ccsr")
    column = pc.if_else(pa.array(lacking), pa.scalar(None, pa.float64()), results["ssim_y"])
    index = results.column_names.index("ssim_y")
    summary = summarise(results.set_column(index, "ssim_y", column), images)
    kept = without(without(results, method="ccsr", key="img1"), method="bicubic")
    expected = np.mean(kept.filter(pc.field("method") == "ccsr")["ssim_y"].to_numpy())
    assert summary["ccsr"]["metrics"]["ssim_y"]["num_images"] == 2
    assert summary["ccsr"]["metrics"]["ssim_y"]["mean"] == pytest.approx(expected, abs=1e-14)
    assert "SSIM of ccsr: 2 of 3 images." in score_table(summary).html()


def test_row_order_does_not_matter(folder: Path) -> None:
    results, images = tables(folder)
    shuffled = results.take(pa.array(np.arange(results.num_rows)[::-1]))
    assert summarise(shuffled, images) == summarise(results, images)


def test_image_row_names_best_and_worst_run() -> None:
    scores = {"psnr_y": [20.0, 22.0, 19.0], "niqe": [None, None, None]}
    row = image_row("m", "k", (8, 9), scores, l_std=0.1, sharpness=float("nan"))
    assert (row["best_run"], row["worst_run"]) == (1, 2)
    assert row["g_std_psnr_y"] == pytest.approx(np.std([20, 22, 19]))
    assert row["g_std_niqe"] is None
    assert row["sharpness"] is None
    blind = image_row("m", "k", (8, 9), {"niqe": [3.0, 3.5]}, l_std=0.1, sharpness=1.0)
    assert blind["best_run"] is None
    with pytest.raises(DataError, match="different numbers of runs"):
        image_row("m", "k", (8, 9), {"psnr_y": [1.0], "niqe": [1.0, 2.0]}, l_std=0, sharpness=1)


def test_a_missing_run_is_named(folder: Path) -> None:
    results, images = tables(folder)
    with pytest.raises(DataError, match="3 runs of every image") as caught:
        summarise(without(results, method="ccsr", key="img1", run=2), images)
    assert "image 'img1', run 2 (1 in all" in caught.value.where


def test_a_doubled_row_is_refused(folder: Path) -> None:
    results, images = tables(folder)
    with pytest.raises(DataError, match="runs of every image"):
        summarise(pa.concat_tables([results, results.slice(0, 1)]), images)


def test_an_image_missing_from_one_method_is_named(folder: Path) -> None:
    results, images = (without(table, method="ccsr", key="img2") for table in tables(folder))
    with pytest.raises(DataError, match="not evaluated on the same images") as caught:
        summarise(results, images)
    assert "img2" in caught.value.where


def test_a_foreign_or_damaged_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file"):
        load_result(tmp_path)
    for name in ("run.json", "results.parquet", "images.parquet"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "results.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="damaged"):
        load_result(tmp_path)
    pq.write_table(tables(folder)[0].drop_columns(["run"]), tmp_path / "results.parquet")
    with pytest.raises(DataError, match="no column run"):
        load_result(tmp_path)


def test_ranks_follow_each_metrics_direction() -> None:
    def method(psnr: float, lpips: float, l_std: float, num_runs: int = 10) -> dict:
        metrics = {
            "psnr_y": {"mean": psnr, "g_std": l_std * 10 if num_runs > 1 else 0.0, "num_images": 5},
            "lpips": {"mean": lpips, "g_std": 0.01, "num_images": 5},
        }
        return {"num_images": 5, "num_runs": num_runs, "l_std": l_std, "sharpness": 0.9, "metrics": metrics}

    summary = {"a": method(24, 0.3, 0.02), "b": method(25, 0.2, 0.03), "gan": method(26, 0.4, 0.0, num_runs=1)}
    rows = dict(table_rows(summary))
    ranks = {label: [[number.rank for number in cell] for cell in cells] for label, cells in rows.items()}
    assert list(rows) == ["↑ PSNR / G-STD ↓", "↓ LPIPS / G-STD ↓", "↓ L-STD / sharpness"]
    assert ranks["↑ PSNR / G-STD ↓"] == [[0, 1], [2, 2], [1, 0]]
    assert [cell[0] for cell in ranks["↓ LPIPS / G-STD ↓"]] == [2, 1, 0]
    assert ranks["↓ L-STD / sharpness"] == [[1, 0], [2, 0], [0, 0]]
    assert [n.text for n in rows["↑ PSNR / G-STD ↓"][0]] == ["24.00", "0.2000"]
    assert [n.text for n in rows["↓ L-STD / sharpness"][2]] == ["0", "0.900"]
    page = score_table(summary).html()
    assert "<b>26.00</b>" in page
    assert "<u>25.00</u>" in page


def test_published_numbers_stand_under_ours_of_the_same_method() -> None:
    pair = {
        "psnr_y": {"mean": 20.0, "g_std": 0.5, "num_images": 1},
        "mine": {"mean": 1.0, "g_std": 0.1, "num_images": 1},
    }
    method = {"num_images": 1, "num_runs": 2, "l_std": 0.01, "sharpness": 0.9, "metrics": pair}
    page = score_table({"CCSR": method, "ours": method}, published=published_summary("Table 1, RealSR")).html()
    assert page.count("paper: ") == 2
    assert "20.00 <i>/</i> 0.5000<br><small>paper: 26.24 / " in page
    assert "<small>paper: 0.0218</small>" in page
    assert "paper" not in score_table({"CCSR": method, "ours": method}).html()


def test_equal_numbers_share_a_rank() -> None:
    pair = {"psnr_y": {"mean": 20.0, "g_std": 0.5, "num_images": 1}}
    method = {"num_images": 1, "num_runs": 2, "l_std": 0.0, "sharpness": None, "metrics": pair}
    better = {**method, "metrics": {"psnr_y": {"mean": 21.0, "g_std": 0.5, "num_images": 1}}}
    (_, psnr), (label, stability) = table_rows({"a": method, "b": better, "c": better})
    assert [cell[0].rank for cell in psnr] == [2, 1, 1]
    assert label == "↓ L-STD"
    assert [cell[0].text for cell in stability] == ["0", "0", "0"]


def test_terminal_table_shows_every_method_and_unavailable(folder: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(score_table(load_result(folder).summary, "small set"))
    text = console.export_text()
    for expected in ("small set", "bicubic", "ccsr", "<other>", "PSNR / G-STD", "unavailable", "Mean over 3 runs"):
        assert expected in text


def test_numbers_of_whole_sets_join_the_summary(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "set_metrics.json").write_text(json.dumps({"ccsr": {"fid": 31.5}, "removed": {"fid": 3.0}}))
    rows = dict(table_rows(load_result(tmp_path).summary))
    assert [cell[0].text for cell in rows["↓ FID"]] == ["unavailable", "31.50", "unavailable"]


def test_published_numbers_are_the_papers() -> None:
    real = published_summary("Table 1, RealSR")
    assert real["CCSR"]["metrics"]["psnr_y"]["mean"] == 26.24
    assert real["CCSR"]["metrics"]["lpips"]["g_std"] == 0.0158
    assert real["CCSR"]["l_std"] == 0.0218
    assert real["BSRGAN"]["num_runs"] == 1
    assert published_summary("Table 4, DIV2K-StableSR")["uniform"]["metrics"]["musiq"]["mean"] == 66.61
    assert published_summary("Table 3, ImageNet1K")["DDRM"]["l_std"] == 0.0113
    assert published_summary("OSEDiff's Table 1, RealSR")["OSEDiff"]["metrics"]["psnr_y"]["mean"] == 25.1511
    with pytest.raises(ConfigError, match="no numbers for 'Table 9'"):
        published_summary("Table 9")


class Page(HTMLParser):
    """Collects what a browser would load and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.images: list[tuple[str, str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action") and value]
        if tag == "img" and "src" in given:
            self.images.append((given["alt"], given["src"]))
        if tag not in ("img", "meta", "input", "br", "link"):
            self.open.append(tag)

    def pictures(self) -> dict[str, np.ndarray]:
        data = {name: np.frombuffer(base64.b64decode(uri.split(",")[1]), np.uint8) for name, uri in self.images}
        return {name: cv2.imdecode(one, cv2.IMREAD_COLOR)[..., ::-1] for name, one in data.items()}

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        pass  # SVG's own closing

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(target: str) -> tuple[str, Page]:
    text, page = Path(target).read_text(), Page()
    page.feed(text)
    assert page.open == []
    return text, page


def test_report_is_one_file_with_every_picture(folder: Path) -> None:
    text, page = parse(write_report(folder))
    assert all(load.startswith("data:image/") for load in page.loads)
    assert "url(" not in text
    assert "@import" not in text
    # per image: LR, HR, bicubic once, best, worst and map of two stochastic methods
    assert len(page.images) == 3 * (2 + 1 + 2 * 3)
    assert text.count("<section>") == 3
    assert "&lt;other&gt;" in text
    assert "<other>" not in text
    assert not re.search(r"\$[a-z]", text)


def test_report_shows_the_right_pixels(folder: Path) -> None:
    _, page = parse(write_report(folder, num_images=1))
    shown = page.pictures()
    result = load_result(folder)
    method = result.methods["ccsr"]
    key = method.keys[int(np.argmin(method.l_std))]
    index = method.keys.index(key)
    assert (shown["LR"] == read_image(result.picture("lr", key))).all()
    best, worst = method.best_run[index], method.worst_run[index]
    assert best is not None
    assert worst is not None
    picture = read_image(result.picture("ccsr", key, best)).astype(int)
    assert np.abs(shown[f"ccsr best {best:02d}"].astype(int) - picture).mean() < 6  # JPEG
    assert f"ccsr worst {worst:02d}" in shown
    # the least stable method's map is the brightest, on the common scale
    assert shown["<other> stability map"].mean() > shown["ccsr stability map"].mean() + 10


def test_report_is_deterministic_and_spreads_over_stability(folder: Path) -> None:
    first = Path(write_report(folder, num_images=2)).read_bytes()
    assert Path(write_report(folder, num_images=2)).read_bytes() == first
    method = load_result(folder).methods["ccsr"]
    order = [method.keys[i] for i in np.argsort(method.l_std)]
    assert re.findall(r"<h3>(\w+)</h3>", first.decode()) == [order[0], order[-1]]


def test_report_of_large_pictures_shows_their_centre(tmp_path: Path) -> None:
    write_result(tmp_path, photographs(1, side=460), {"m": (2, noisy(5))})
    _, page = parse(write_report(tmp_path))
    sizes = {name: picture.shape[:2] for name, picture in page.pictures().items()}
    assert sizes.pop("LR") == (100, 100)
    assert set(sizes.values()) == {(400, 400)}


def test_report_without_ground_truth(folder: Path, tmp_path: Path) -> None:
    write_result(tmp_path, photographs(2), {"m": (2, noisy(5))}, run={"published": "Table 1, RealSR"})
    for name in ("results", "images"):
        table = pq.read_table(tmp_path / f"{name}.parquet")
        gone = [column for column in table.column_names if "psnr" in column]
        for column in ("best_run", "worst_run"):
            if column in table.column_names:
                empty = pa.nulls(table.num_rows, pa.int32())
                table = table.set_column(table.column_names.index(column), column, empty)
        pq.write_table(table.drop_columns(gone), tmp_path / f"{name}.parquet")
    for picture in (tmp_path / "images" / "hr").iterdir():
        picture.unlink()
    text, page = parse(write_report(tmp_path))
    assert {"LR", "m run 00", "m run 01", "m stability map"} == set(page.pictures())
    assert "SSIM per image" in text
    assert "Published: CCSR paper" in text


def test_a_missing_picture_or_map_is_named(tmp_path: Path) -> None:
    write_result(tmp_path, photographs(1), {"m": (2, noisy(5))})
    stability_map = tmp_path / "images" / "m" / "l_std" / "img0.png"
    stability_map.write_bytes((tmp_path / "images" / "hr" / "img0.png").read_bytes())
    with pytest.raises(DataError, match="no stability map"):
        write_report(tmp_path)
    stability_map.unlink()
    with pytest.raises(StorageError) as caught:
        write_report(tmp_path)
    assert caught.value.where == str(stability_map)


def test_results_of_one_set_merge_into_one_report(folder: Path, tmp_path: Path) -> None:
    """The same method of both is kept once; another one of that name gets its result's name; pictures stay where they
    are."""
    other = write_result(tmp_path / "other", photographs(3), {"bicubic": METHODS["bicubic"], "gan": (1, noisy(2))})
    third = write_result(tmp_path / "third", photographs(3), {"ccsr": (2, noisy(9))}, method_config={"steps": 4})
    done = CliRunner().invoke(app, ["report", str(folder), str(other), str(third), "--out", f"{tmp_path}/all.html"])
    assert done.exit_code == 0, done.output
    assert "Stability over unlike numbers of runs is not ranked" in " ".join(done.output.split())
    merged = merge_results([load_result(place) for place in (folder, other, third)])
    assert list(merged.methods) == ["bicubic", "ccsr", "<other>", "gan", "ccsr (third)"]
    assert merged.picture("ccsr (third)", "img0", 1) == f"{third}/images/ccsr/01/img0.png"
    page = Page()
    page.feed((tmp_path / "all.html").read_text())
    assert {name for name, _ in page.images} >= {"gan only run", "ccsr (third) stability map"}
    for run, what in (({"convention": "pyiqa"}, "convention"), ({"dataset_id": "set-2"}, "dataset_id")):
        unlike = write_result(tmp_path / what, photographs(3), {"m": (1, noisy(2))}, run=run)
        with pytest.raises(DataError, match=f"their {what} differs"):
            merge_results([load_result(folder), load_result(unlike)])


def test_a_comparison_as_html(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["compare", str(folder), "--html", f"{tmp_path}/c.html"])
    assert done.exit_code == 0, done.output
    page = Page()
    page.feed((tmp_path / "c.html").read_text())
    text = (tmp_path / "c.html").read_text()
    assert "&lt;other&gt; against" in text
    assert page.images, "the methods' pictures side by side"
    for label in ("stability map", f"{folder.name}:bicubic only run", f"{folder.name}:ccsr best"):
        assert label in text


def test_an_earlier_versions_result_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    run = json.loads((tmp_path / "run.json").read_text())
    del run["convention"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(DataError, match="an earlier version made this result"):
        load_result(tmp_path)


def test_a_method_blurrier_than_bicubic_is_flagged_and_not_ranked(tmp_path: Path) -> None:
    methods = {
        "sharp": (3, noisy(9, 1.5)),
        "blurred": (3, lambda b, rng: cv2.GaussianBlur(noisy(9)(b, rng), (0, 0), 3)),
    }
    summary = load_result(write_result(tmp_path, photographs(3), {**methods, "sharper": (3, noisy(20, 2.5))})).summary
    rows = dict(table_rows(summary))
    assert [cell[0].rank for cell in rows["↓ L-STD / sharpness"]] == [2, 1, 0]
    assert [cell[0].rank for cell in rows["↓ L-STD at equal sharpness"]] == [1, 0, 2]
    assert rows["↓ L-STD at equal sharpness"][1][0].text == "unavailable"
    assert "blurred is blurrier than bicubic on 3 of 3 images" in score_table(summary).html()


def test_a_trace_is_drawn(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for method, psnr in (("ccsr", [18.0, 21.0]), ("<other>", [17.0, 20.0])):
        steps = [{"t": t, "psnr_y": p, "sharpness": 0.5, "l_std": 0.01} for t, p in zip((999, 333), psnr, strict=True)]
        (tmp_path / "images" / method / "trace.json").write_text(json.dumps({"img0": steps, "img1": steps}))
    plots = trace_plots(load_result(tmp_path))
    assert [panel["label"] for panel in plots["panels"]] == ["PSNR", "sharpness", "L-STD"]
    ccsr, other = plots["panels"][0]["lines"]
    assert [point.split(",")[0] for point in ccsr["points"]] == ["50.0", "210.0"]
    assert float(ccsr["points"][1].split(",")[1]) < float(other["points"][1].split(",")[1])  # better is higher up
    assert plots["num_images"] == 2
    page = Path(write_report(tmp_path)).read_text()
    assert page.count("<polyline") == 6
    assert trace_plots(load_result(folder)) is None
