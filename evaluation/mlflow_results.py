"""An evaluation's result in MLflow: a run with report, tables and pictures, and a run per method."""

from collections.abc import Sequence
from typing import Any

from evaluation.compare import Comparison
from evaluation.config import EvaluateConfig, Method, ModelMethod
from evaluation.inputs import folders_of
from evaluation.metrics.names import needs_runs
from evaluation.report.page import comparison_page, read_map
from evaluation.results import TRACE, EvaluationResult, is_deterministic, method_file
from infra.config import fingerprint_of, parameters
from infra.errors import ClusterError, line_of
from infra.files.publish import temporary_folder
from infra.files.storage import exists, join, list_files, name_of, read_bytes
from infra.imaging.images import encode_png
from infra.imaging.pixels import coloured
from infra.mlflow.models import DIGEST_TAG, MODEL_TAG, logged_model, trained_by
from infra.mlflow.server import TrackingConfig, mlflow_errors, tracking_uri
from infra.mlflow.tracking import Tracker, cite, link, run_of, track

MAX_LOGGED_IMAGES = 8
TABLE = "scores.json"


def log_result(config: EvaluateConfig, result: EvaluationResult) -> None:
    """Log a complete result folder; again on the same runs if it was logged before.

    Raises ClusterError where the server is away, saying how to send the result later.
    """
    tags = {"ccsr.dataset_id": result.run["dataset_id"]}
    try:
        with track(config.tracking, result.run, tags, output=config.output, parameters=parameters(config)) as tracker:
            summary = result.summary
            lines = [_log_method(tracker, config, result, method, summary[method.name]) for method in config.methods]
            _log_data(tracker, config, result)
            folders = ", ".join(cite(tracker.client, folder) for part in config.data for folder in folders_of(part))
            own = tracker.client.get_run(tracker.run_id)
            tracker.note(
                f"{next(iter(summary.values()))['num_images']} images, {config.num_runs} runs each. Each method "
                f"has its own run; {link(own, 'report.html')} has pictures and intervals.",
                "\n".join(lines),
                f"Data: {folders} ({result.run['dataset_id']})",
                f"Output: `{config.output}`",
            )
            _log_table(tracker, summary)
            _log_artifacts(tracker, config, result)
    except ClusterError as error:
        raise ClusterError(
            f"the result is complete, but MLflow did not take it ({line_of(error)})",
            where=f"{result.folder} to {tracking_uri(config.tracking)}",
            todo="when the server answers: ccsr evaluate -c FILE --log-only",
        ) from error


def log_comparison(comparison: Comparison, results: Sequence[str], tracking: TrackingConfig) -> str:
    """Log a comparison as its own MLflow run, in the first compared run's experiment: every row as CSV, the tables as
    text, the page. Returns the run's id. Raises ClusterError where the server is away.
    """
    from rich.console import Console

    tracking = tracking.model_copy(update={"experiment": _experiment(comparison, tracking)})
    config = {"results": list(results), "baseline": comparison.baseline}
    rows = [[row.candidate, row.metric, row.mean, row.low, row.high] for row in comparison.differences]
    fingerprint = fingerprint_of({"config": config, "rows": rows})
    with (
        track(tracking, {"job": "compare", "fingerprint": fingerprint, "config": config}) as tracker,
        temporary_folder("compare") as folder,
    ):
        compared = ", ".join(f"`{one}`" for one in results)
        page = link(tracker.client.get_run(tracker.run_id), "comparison.html")
        evaluations = (run_of(tracker.client, result.folder) for result in comparison.results)
        linked = ", ".join(dict.fromkeys(link(run) for run in evaluations if run))
        tracker.note(
            f"Compared: {compared}, against {comparison.baseline}. {page} has all.", linked and f"Evaluations: {linked}"
        )
        comparison.write_csv(folder / "differences.csv")
        with (folder / "comparison.txt").open("w", encoding="utf-8") as file:
            for table in comparison.tables():
                Console(file=file, width=120, soft_wrap=True).print(table)
        (folder / "comparison.html").write_text(comparison_page(comparison), encoding="utf-8")
        tracker.artifact(folder)
        return tracker.run_id


def _experiment(comparison: Comparison, tracking: TrackingConfig) -> str:
    from mlflow.tracking import MlflowClient

    uri = tracking_uri(tracking)
    with mlflow_errors(uri):
        client = MlflowClient(uri)
        for result in comparison.results:
            run = run_of(client, result.folder)
            number = run.info.experiment_id if run else result.run.get("mlflow_experiment")
            if number:
                return client.get_experiment(number).name
    return tracking.experiment


def method_metrics(summary: dict[str, Any]) -> dict[str, float]:
    """A method's numbers as MLflow's metrics: METRIC, METRIC.g_std, METRIC.p_g_std, l_std, ...; without those that are
    unavailable or would sort it before the others for nothing: stability over runs that never differ, and L-STD at
    equal sharpness without the images on which it is blurrier than bicubic."""
    names = ("l_std", "l_std_equal_sharpness", "num_blurrier", "p_std", "sharpness")
    flat: dict[str, float | None] = {name: summary[name] for name in names}
    for metric, numbers in summary["metrics"].items():
        label = metric.replace("+", "_plus")  # MLflow takes no plus sign
        flat |= {label: numbers["mean"], f"{label}.g_std": numbers["g_std"], f"{label}.p_g_std": numbers.get("p_g_std")}
    if is_deterministic(summary):
        flat = {name: value for name, value in flat.items() if not (needs_runs(name) or name.endswith(".g_std"))}
    elif summary["num_blurrier"]:
        del flat["l_std_equal_sharpness"]
    return {name: value for name, value in flat.items() if value is not None}


def _log_method(
    tracker: Tracker, config: EvaluateConfig, result: EvaluationResult, method: Method, summary: dict[str, Any]
) -> str:
    """The method's run, with its model as input; its line in the evaluation's description."""
    from mlflow.entities import LoggedModelInput

    tags = {"ccsr.job": "method", "ccsr.dataset_id": result.run["dataset_id"]}
    client, trained, model = tracker.client, None, None
    if isinstance(method, ModelMethod):
        tags |= {MODEL_TAG: method.model, DIGEST_TAG: result.run["inputs"]["methods"][method.name]}
        trained, model = trained_by(client, method.model), logged_model(client, method.model, tags[DIGEST_TAG])
        tags |= {"ccsr.trained_by": trained.info.run_id} if trained else {}
    child = tracker.child(method.name, tags, parameters(method))
    _log_data(child, config, result)
    if model:
        client.log_inputs(child.run_id, models=[LoggedModelInput(model.model_id)])
    dataset = (name_of(folders_of(config.data[0])[0]), result.run["dataset_id"]) if model else ()
    child.metrics(method_metrics(summary), model=model.model_id if model else None, dataset=dataset)
    _log_pictures(child, result, method.name)
    psnr = summary["metrics"].get("psnr_y", {}).get("mean")
    quality = f"PSNR-Y {psnr:.2f} dB, " if psnr is not None else ""
    stability = "deterministic" if is_deterministic(summary) else f"L-STD {summary['l_std']:.4f}"
    numbers = f"{quality}{stability}"
    by = f"trained by {link(trained)}" if trained else ""
    child.note(
        f"Method {method.name} of {link(client.get_run(tracker.run_id))}: {numbers}",
        f"Model: `{method.model}`{by and ', '}{by}" if isinstance(method, ModelMethod) else "",
    )
    client.set_terminated(child.run_id)
    return f"* {link(client.get_run(child.run_id))}: {numbers}{by and ', '}{by}"


def _log_data(tracker: Tracker, config: EvaluateConfig, result: EvaluationResult) -> None:
    folder = folders_of(config.data[0])[0]
    tracker.dataset(name_of(folder), result.run["dataset_id"], folder, "evaluation")


def _log_pictures(child: Tracker, result: EvaluationResult, name: str) -> None:
    """Best and worst run and the stability map of the first images, those that the run has not yet."""
    method = result.methods[name]
    pictures: dict[str, tuple[str, int | None]] = {}  # the image's key, and its run or None for the map
    for index, key in enumerate(method.keys[:MAX_LOGGED_IMAGES]):
        best, worst = method.best_run[index], method.worst_run[index]
        labelled = {"run_00": 0} if best is None or worst is None else {"best": best, "worst": worst}
        for label, run in labelled.items() if method.num_runs > 1 else [(next(iter(labelled)), 0)]:
            pictures[f"{key}/{label}"] = key, run
        if method.num_runs > 1:
            pictures[f"{key}/l_std"] = key, None
    for place in child.without_images(list(pictures)):
        picture, is_map = result.picture(name, *pictures[place]), pictures[place][1] is None
        child.image(place, encode_png(coloured(read_map(picture))) if is_map else read_bytes(picture))


def _log_table(tracker: Tracker, summary: dict[str, Any]) -> None:
    """The methods' numbers as MLflow's table, a row per method."""
    rows = {name: method_metrics(method) for name, method in summary.items()}
    columns = list(dict.fromkeys(name for values in rows.values() for name in values))
    tracker.table(
        TABLE, ["method", *columns], [[name, *(values.get(c) for c in columns)] for name, values in rows.items()]
    )


def _log_artifacts(tracker: Tracker, config: EvaluateConfig, result: EvaluationResult) -> None:
    """The tables, the report, and the pictures of the first images."""
    keys = next(iter(result.methods.values())).keys[:MAX_LOGGED_IMAGES]
    names = ("run.json", "results.parquet", "images.parquet", "report.html", "set_metrics.json", "orderings.json")
    wanted = [place for name in names if exists(place := join(config.output, name))]
    wanted += [method_file(config.output, name) for name in result.methods]
    for place in list_files(join(config.output, "images")):
        if place.rsplit("/", 1)[-1].removesuffix(".png") in {*keys, TRACE}:
            wanted.append(place)
    with temporary_folder("artifacts") as folder:
        for place in wanted:
            target = folder / place.removeprefix(config.output).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read_bytes(place))
        tracker.artifact(folder)
