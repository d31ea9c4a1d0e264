"""Results to compare or report: a folder or an MLflow run by its id or name; several merged into one."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluation.results import EvaluationResult, MethodScores, load_result
from infra.errors import DataError
from infra.files.locations import location
from infra.files.storage import exists, join
from infra.mlflow.server import TrackingConfig, is_missing, mlflow_errors, tracking_uri

_NEEDED = ("run.json", "results.parquet", "images.parquet")


def find_result(uri: str, tracking: TrackingConfig, scratch: Path, *, pictures: bool = False) -> EvaluationResult:
    """The result in folder `uri`, else of the MLflow run with that id or name.

    Such a run's tables, with `pictures` those that it has of them too, are fetched below `scratch`.
    Raises StorageError for a folder without a result, DataError for a name that no run or several have, ClusterError
    where MLflow does not answer.
    """
    if "/" in uri or uri.startswith("~") or exists(join(uri, "run.json")):
        return load_result(location(uri))
    server = tracking_uri(tracking)
    if is_missing(server):
        raise DataError(
            f"{uri!r} is no result folder, and there is no MLflow database",
            where=server,
            todo="check the path, or --mlflow",
        )
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.tracking import MlflowClient

    with mlflow_errors(server):
        client = MlflowClient(server)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(
            experiments, f"attributes.run_id = '{uri}'" if _is_run_id(uri) else f"run_name = '{uri}'"
        )
        if len(found) != 1:
            listed = ", ".join(run.info.run_id for run in found[:5])
            raise DataError(
                f"{uri!r} is no result folder, and {len(found) or 'no'} MLflow runs are called so",
                where=f"{server}: {listed}" if found else server,
                todo="give a result folder or the id of one MLflow run" if found else "check the name and --mlflow",
            )
        run_id = found[0].info.run_id
        folder = scratch / run_id
        folder.mkdir(parents=True, exist_ok=True)
        names = {item.path for item in client.list_artifacts(run_id)}
        if not names.issuperset(_NEEDED):
            raise DataError(
                f"the MLflow run {uri!r} holds no evaluation result", where=server, todo="give a run of ccsr evaluate"
            )
        for name in names & {*_NEEDED, "methods", "set_metrics.json", *(["images"] if pictures else [])}:
            client.download_artifacts(run_id, name, str(folder))
    result = load_result(folder)
    run = result.run | {"mlflow_experiment": found[0].info.experiment_id}
    return dataclasses.replace(result, run=run, name=found[0].info.run_name or run_id)


def merge_results(results: Sequence[EvaluationResult]) -> EvaluationResult:
    """One result with the methods of all, for a report; the same method with the same metrics is kept once.

    Its pictures of LR and HR are the first result's. Raises DataError where test set, convention, images or the
    perturbations of the input differ.
    """
    first = results[0]
    methods: dict[str, MethodScores] = {}
    origins: dict[str, tuple] = {}
    configs, inputs, set_metrics = {}, {}, {}
    perturbed: list[EvaluationResult] = []  # those with a P-STD
    for result in results:
        for name, method in result.methods.items():
            require_same_set(first, result, first.methods[next(iter(first.methods))], method)
            has_p_std = bool(np.isfinite(method.p_std).any())
            if has_p_std:
                perturbed.append(result)
                _require_same_perturbations(perturbed[0], result)
            config, input_id = (result.run[part]["methods"][name] for part in ("config", "inputs"))
            numbers = {*method.scores, *result.run.get("set_metrics", {}).get(name, {})}
            origin = (config, input_id, result.run.get("seed"), method.num_runs, numbers, has_p_std)
            if origins.get(name) == origin:
                continue
            label = name if name not in methods else f"{name} ({result.name})"
            label = label if label not in methods else f"{label} #{len(methods) + 1}"
            methods[label] = dataclasses.replace(method, name=label)
            origins[label], configs[label], inputs[label] = origin, config, input_id
            if name in result.run.get("set_metrics", {}):
                set_metrics[label] = result.run["set_metrics"][name]
    run = first.run | {"config": {**first.run["config"], "methods": configs}, "set_metrics": set_metrics}
    run["inputs"] = first.run["inputs"] | {"methods": inputs}
    return dataclasses.replace(first, run=run, methods=methods)


def require_same_set(
    first: EvaluationResult,
    second: EvaluationResult,
    method: MethodScores,
    other: MethodScores,
    names: Sequence[str] = (),
) -> None:
    """DataError where two results have other test sets, conventions or images; `names`: their labels in it."""
    label, other_label = names or (f"{first.name}:{method.name}", f"{second.name}:{other.name}")
    for name in ("dataset_id", "convention"):
        ours, theirs = first.run.get(name), second.run.get(name)
        if ours is None or ours != theirs:
            raise DataError(
                f"these results cannot be compared: their {name} differs or is unknown",
                where=f"{label} has {ours!r}, {other_label} has {theirs!r}",
                todo="evaluate both on the same test set with the same convention",
            )
    if method.keys != other.keys:
        only, only_other = (sorted(a) for a in (set(method.keys) - set(other.keys), set(other.keys) - set(method.keys)))
        examples = "; ".join(
            f"only {name} has {len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for name, keys in ((label, only), (other_label, only_other))
            if keys
        )
        raise DataError(
            "these results cannot be compared: their images differ",
            where=examples,
            todo="evaluate both on the same images",
        )


def _require_same_perturbations(first: EvaluationResult, second: EvaluationResult) -> None:
    ours, theirs = (result.run["config"].get("perturbations") for result in (first, second))
    if ours != theirs:
        raise DataError(
            "these results cannot be ranked together: their perturbations of the input differ",
            where=f"{first.name} has {ours!r}, {second.name} has {theirs!r}",
            todo="evaluate both with the same perturbations",
        )


def _is_run_id(text: str) -> bool:
    return len(text) == 32 and all(c in "0123456789abcdef" for c in text)
