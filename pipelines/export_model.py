"""`ccsr export`: a model for programs that do not have this project."""

import json
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evaluation.report.tables import interval_table
from evaluation.results import load_result
from infra.display.templating import render
from infra.errors import ConfigError, ModelError
from infra.files.locations import check_output
from infra.files.publish import shared_copy, temporary_folder, upload_folder
from infra.files.storage import exists, is_s3, join, list_files, read_json
from infra.mlflow.models import find_model
from infra.mlflow.server import TrackingConfig
from infra.shards.manifest import Manifest
from training.models.directory import PROMPTS, load_part, read_record, read_weights
from training.models.remote import merged
from training.restore.pipeline import BESIDE, SAMPLING
from training.restore.standalone import pipeline_sources

INDEX = "model_index.json"
PARTS = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel", "controlnet": "ControlNetModel"}


def export_diffusers(
    model: str, out: str, *, data: Sequence[str] = (), metrics: str | None = None, licence: str = "other"
) -> str:
    """Write a directory that plain diffusers loads and runs; returns `out`.

    The model's own files, with LoRAs merged, and ccsr.json are among it, so it is a model directory too;
    model_index.json is last. For the card, `data`: shard sets that it was trained on; `metrics`: an evaluation's
    folder, or FOLDER:METHOD. ModelError for a model without its prompt, ConfigError where OUT holds something else.
    """
    model = find_model(model, TrackingConfig())
    check_output(out, [model])
    if list_files(out) and not exists(join(out, INDEX)):
        raise ConfigError("the output holds something else", where=out, todo="choose another folder, or empty this one")
    scores = _metrics(metrics) if metrics else {"metrics": []}
    sources = _training_data(model, data)
    with shared_copy(model, "ccsr.json") as source, temporary_folder("export") as scratch:
        source = merged(source, scratch / "merged")
        record = read_record(source)
        if not (source / PROMPTS).is_file() or "" not in read_weights(source / PROMPTS):
            raise ModelError(
                "the model has no embedding of the empty prompt, without which it cannot run",
                where=model,
                todo="convert the model again with its text encoder: ccsr convert",
            )
        folder = scratch / "out"
        files = ["ccsr.json", *record.sha256]
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        names = {Path(name).parts[0] for name in record.sha256}
        for name, text in pipeline_sources(record.family).items():
            (folder / name).write_text(text)
        count = sum(p.numel() for name in names - {PROMPTS} for p in load_part(source / name, name).parameters())
        card = render(
            Path(__file__).with_name("MODEL_CARD.md.j2"),
            name=Path(out).name,
            family=record.family,
            prediction=record.prediction,
            parameters=round(count / 1e6, 1),
            num_steps=SAMPLING["num_steps"] if "num_steps" in record.facts.samples else None,
            diffusers=".".join(version("diffusers").split(".")[:2]),
            licence=licence,
            data=sources,
            **scores,
        )
        (folder / "README.md").write_text(card)
        (folder / INDEX).write_text(json.dumps(_index(record, names), indent=2) + "\n")
        upload_folder(folder, out, last=INDEX)
    return out


def _index(record: Any, names: set[str]) -> dict[str, Any]:
    classes = PARTS | {"condition_encoder": "AutoencoderKL"}
    parts = {name: ["diffusers", kind] if name in names else [None, None] for name, kind in classes.items()}
    return {
        "_class_name": "CcsrPipeline",
        "_diffusers_version": version("diffusers"),
        "family": record.family,
        "prediction": record.prediction,
        "beside": sorted(names & set(BESIDE)),
        **parts,
    }


def _training_data(model: str, uris: Sequence[str]) -> list[dict[str, Any]]:
    """The sources of the shard sets `uris`, or the ids of those that the run around a model directory was trained on.
    ConfigError for a set that this run did not see."""
    place = join(model.rpartition("/")[0], "run.json")
    run = read_json(place) if exists(place) else {}
    known = run["inputs"]["dataset_ids"] if run.get("job") == "train" else None
    sources: list[dict[str, Any]] = []
    for uri in uris:
        manifest = Manifest.load(uri)
        if known is not None and manifest.dataset_id not in known:
            raise ConfigError("this model was not trained on this set", where=uri, todo="give the run's own data")
        sources += manifest.sources
    return sources or [{"name": f"dataset {name}", "num_files": "", "licence": None} for name in known or []]


def _metrics(uri: str) -> dict[str, Any]:
    folder, _, method = uri.partition(":") if not is_s3(uri) else (uri, "", "")
    result = load_result(folder)
    method = method or next(iter(result.methods))
    if method not in result.methods:
        known = ", ".join(result.methods)
        raise ConfigError(f"no method is called {method}", where=folder, todo=f"give FOLDER:METHOD, one of {known}")
    scores = result.methods[method]
    table = interval_table({method: scores})
    rows = [["".join(text for text, _ in cell.parts) for cell in row] for row in table.rows]
    return {"metrics": rows, "method": method, "num_images": len(scores.keys)}
