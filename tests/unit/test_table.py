"""One table in three forms: no width breaks words or numbers, HTML is escaped, JSON keeps the values."""

import io
import json
from collections import Counter
from functools import cache

import pytest
from result_folder import noisy, photographs, write_result
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from evaluation.compare import compare
from evaluation.report.orderings import orderings_table, published_orderings
from evaluation.report.tables import published_summary, score_table
from evaluation.results import load_result
from infra.cluster.jobs import JobRow
from infra.display.table import Cell, Table, cell
from pipelines.cli.cluster import jobs_table
from pipelines.cli.main import app
from pipelines.estimate.shards import Amount, ShardEstimate, shard_table
from pipelines.estimate.training import Assumed, TrainEstimate, train_tables
from training.config import TrainConfig
from training.run.cost.parameters import model_tables

GROUP = "Table 4, RealSR"


def printed(table: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), soft_wrap=True)
    console.print(table)
    return console.file.getvalue()


def jobs() -> list[Table]:
    command = "ccsr train -c ccsr_v2_stage1.yaml --set output=s3://a-bucket/runs/of/a/long/name/stage1 --set seed=3"
    rows = [
        JobRow("ccsr-train-0123456789ab-1", "SUCCEEDED", 1.7e9, 1.7e9 + 7e4, 0, command, ""),
        JobRow("ccsr-evaluate-0123456789ab-12", "RUNNING", 1.7e9, None, None, "ccsr verify s3://b/x", ""),
    ]
    return [jobs_table(rows)]


@cache
def estimates() -> list[Table]:
    values = {
        "job": "train",
        "init_from": "random",
        "output": "o",
        "stage": 2,
        "data": ["d"],
        "num_updates": 20_000,
        "model": {"family": "v1"},
    }
    parts = {"weights": 2**31, "gradients": 2**30, "optimiser": 3 * 2**30, "activations": 2**34}
    one = TrainEstimate(4, 4, 6, parts, 2**32, 2**30, 2**26, 2.99, 167.7, 3.2, 12.7, 38.16)
    some = ShardEstimate(10_000, 16, 1_234, 8, *(Amount(1e6 * n, 1e4) for n in range(1, 6)))
    trained = train_tables(TrainConfig.model_validate(values), Assumed(), [one] * 3)
    return [*trained, *model_tables("tiny"), shard_table(some)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Table]:
    """The tables of an evaluation and of two comparisons."""
    folder = tmp_path_factory.mktemp("r")
    methods = {"CCSR": (2, noisy(9)), "truncated": (2, noisy(5)), "uniform": (2, noisy(14))}
    write_result(folder / "a", photographs(3), methods, run={"config": {"model": {"path": "s3://bucket/" + "x" * 70}}})
    write_result(folder / "b", photographs(3), {"照片修复方法": (2, noisy(3))}, seed=1)
    orderings = [ordering.to_dict() for ordering in published_orderings(load_result(folder / "a"), GROUP)]
    compared = compare([f"{folder / 'a'}:CCSR", folder / "b", f"{folder / 'a'}:uniform"]).tables()
    papers = published_summary("Table 1, RealSR")
    scored = [score_table(load_result(folder / "a").summary, "ours"), score_table(papers, "theirs", papers)]
    return [*compared, *scored, orderings_table(orderings, GROUP)]


@pytest.mark.parametrize("width", [200, 80, 60, 40])
def test_no_word_and_no_number_is_broken(width: int, results: list[Table]) -> None:
    for table in [*results, *jobs(), *estimates()]:
        text = printed(table, width)
        cells = (text for row in table.rows for one in row for text, _ in one.parts)
        words = Counter(word for text in [*cells, *table.columns] for word in text.split())
        assert not words - Counter(text.split()), table.title
        longest = max(cell_len(word) for word in words)
        label = max(map(cell_len, table.columns))
        assert all(cell_len(line) <= max(width, label + 2 + longest) for line in text.splitlines()), table.title


def test_tables_for_a_terminal_of_80_columns_stay_tables(results: list[Table]) -> None:
    by_title = {table.title: printed(table, 80) for table in [*results, *estimates()]}
    compared = by_title["b:照片修复方法 against a:CCSR"].splitlines()
    assert compared[1].split()[:4] == ["metric", "baseline", "value", "differs"]
    assert all(len(line.split()) == 11 for line in compared[3:8])  # one line a metric
    answer = by_title["stage 2: 20,000 updates of 96 = 1,920,000 samples"].splitlines()
    assert answer[3].split() == ["time", "3.2", "3.2", "3.2", "hours"]
    assert answer[5].split() == ["cost", "38.16", "38.16", "38.16", "USD"]


def test_what_does_not_fit_side_by_side_has_a_line_for_each_value() -> None:
    lines = printed(jobs()[0], 60).splitlines()
    assert lines[:2] == ["job      ccsr-train-0123456789ab-1", "status   SUCCEEDED"]
    assert lines[5] == "command  ccsr train -c ccsr_v2_stage1.yaml --set"
    assert lines[6] == "         output=s3://a-bucket/runs/of/a/long/name/stage1"
    assert lines[8] == ""
    assert not any(line.startswith(("exit", "ended")) for line in lines[9:])  # not known yet


def test_a_train_config_has_the_answer_first_and_only_its_own_networks() -> None:
    answer, _, networks, *_ = estimates()
    assert [row[0].value for row in answer.rows[:3]] == ["time", "GPU time", "cost"]
    assert all(row[-1].value for row in answer.rows), "every number has its unit"
    parts = [row[0].value for row in networks.rows]
    assert parts[-2:] == ["trained by this config (stage 2)", "PatchGAN"]
    assert not any("v1 only" in part or "DINO" in part for part in parts)


def test_html_is_escaped_and_has_its_marks() -> None:
    table = Table(("<name>", "value"), notes=["a & b"])
    table.add("<script>", Cell([1.0, 2.0], (("1", "best"), ("\n", ""), ('"2"', "beside"))))
    assert "<tr><th>&lt;script&gt;</th><td><b>1</b><br><small>&#34;2&#34;</small></td></tr>" in table.html()
    assert '<th scope="col">&lt;name&gt;</th>' in table.html()
    assert '<p class="note">a &amp; b</p>' in table.html()


def test_columns_of_numbers_are_on_the_right() -> None:
    table = Table(("what", "number"))
    table.add("a", 1234)
    table.add("b", cell(None))
    table.add("c", cell(0.5, ".2f"))
    assert printed(table, 80).splitlines()[2:] == ["a      1,234", "b", "c       0.50"]


@pytest.mark.parametrize(
    "arguments", [["weights", "list"], ["weights", "check"], ["doctor"], ["estimate", "--model", "tiny"]]
)
def test_every_listing_has_json(arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("CCSR_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "40")
    values = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert isinstance(values, list)
    assert all(isinstance(value, dict) for value in values)
    if arguments[0] == "estimate":
        assert values[0]["rows"][0] == {"part": "UNet", "parameters": 1_886_084, "trained in": ""}
        assert values[0]["notes"] == []
    else:
        assert {"name", "state"} <= values[0].keys()
        assert all(value["name"] for value in values)


def test_a_comparison_as_json_has_its_numbers(tmp_path) -> None:
    write_result(tmp_path / "a", photographs(3), {"m": (2, noisy(9)), "n": (2, noisy(5))})
    done = CliRunner().invoke(app, ["compare", f"{tmp_path}/a:m", f"{tmp_path}/a:n", "--json"])
    (compared,) = json.loads(done.stdout)
    (psnr,) = [row for row in compared["rows"] if row["metric"] == "psnr_y"]
    (truth,) = [one for one in compare([f"{tmp_path}/a:m", f"{tmp_path}/a:n"]).differences if one.metric == "psnr_y"]
    assert (psnr["differs"], psnr["95 % interval"], psnr["wins"]) == (truth.mean, [truth.low, truth.high], truth.wins)
