"""One YAML per run: strict models, `--set` overrides, and the fingerprint of what a result depends on."""

import copy
import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from infra.errors import ConfigError, StorageError
from infra.files.locations import parse_location, parse_model, parse_tracking
from infra.files.storage import read_bytes


class Config(BaseModel):
    """Base of every config: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def unused(self) -> dict[str, str]:
        """Fields that change nothing beside the others' values, each with where that is so ("in stage 1").

        They may hold nothing but their defaults, and stay out of the fingerprint.
        """
        return {}

    def unused_in_fingerprint(self) -> dict[str, str]:
        """As `unused`, of fields that earlier versions accepted: their defaults stay in the fingerprint."""
        return {}

    @model_validator(mode="after")
    def _refuse_unused(self) -> Self:
        for name, where in (self.unused() | self.unused_in_fingerprint()).items():
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"`{name}` has no effect {where}: leave it out")
        return self

    def runtime_in_result(self) -> dict[str, Any]:
        """The fields of `runtime` that the result depends on: none, unless a config says otherwise."""
        return {}


Location = Annotated[str, "location", AfterValidator(parse_location)]
"""A path, made absolute since workers have other working folders, or an s3:// URI. It says where something is, not what
it is, so it stays out of the fingerprint."""
ModelLocation = Annotated[str, "location", AfterValidator(parse_model)]
TrackingLocation = Annotated[str, "location", AfterValidator(parse_tracking)]

EXTENDABLE = "extendable"
"""Marks a field that says where a result ends, not what it is: it stays out of the fingerprint, so that a run can be
extended."""
LATER = "later"
"""Marks a field that earlier versions lack: at its default it stays out of the fingerprint, so that the outputs they
began can be resumed."""

RENAMED = {
    "use_gpu": "device",
    "threads_per_worker": "threads",
    "threads_per_actor": "threads",
    "runs_at_once": "rows_at_once",
}
"""Keys of earlier versions and today's, for the error that refuses them."""

ABSENT = type("Absent", (), {"__str__": lambda self: "absent"})()

ConfigT = TypeVar("ConfigT", bound=Config)
MERGE_TAG = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML without two surprises that PyYAML accepts: a key that is there twice, and 010 for 8 or 1:30 for 90."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if str(key.value) in lines and key.tag != MERGE_TAG:
                problem = f"the key `{key.value}` is there twice, in lines {lines[str(key.value)]} and {line}"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            lines[str(key.value)] = line
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value, digits = super().construct_yaml_int(node), node.value.lstrip("+-")
        if ":" in digits or (digits[0] == "0" and digits.isdigit() and len(digits) > 1):
            problem = f"YAML reads {node.value} as {value}: write {value}, or put it in quotes"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader


class FieldError(ValueError):
    """What a config's validator raises to name the field, below that config, that is wrong, and what to write."""

    def __init__(self, what: str, *, field: str, todo: str) -> None:
        super().__init__(what)
        self.field, self.todo = field, todo


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises ConfigError for a missing file, a syntax error or anything but a mapping."""
    try:
        values = _parse_yaml(read_bytes(str(path)).decode())
    except StorageError as error:
        raise ConfigError(
            f"the config cannot be read ({error.what.removeprefix('cannot read: ')})",
            where=str(path),
            todo="check the path given to -c",
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        raise ConfigError(
            f"the config is not valid YAML ({getattr(error, 'problem', error)})",
            where=f"{path}, line {place.line + 1}" if place else str(path),
            todo="correct the syntax there",
        ) from error
    if not isinstance(values, dict):
        raise ConfigError("the config is not a mapping of keys to values", where=str(path), todo="see configs/demo")
    return values


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `a.b=c` applied; c is parsed as YAML, a number in the path indexes a list."""
    values = copy.deepcopy(values)
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path:
            raise ConfigError(f"--set {override} is not of the form key=value", where="--set", todo="write a.b=c")
        *parents, last = path.split(".")
        node: Any = values
        try:
            for part in parents:
                node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
            node[int(last) if isinstance(node, list) else last] = _parse_yaml(text)
        except (TypeError, ValueError, IndexError, AttributeError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(
                f"--set {override} does not fit the config", where=path, todo="see `ccsr config show` for the keys"
            ) from error
    return values


def parse_config(values: Mapping[str, Any], config_class: type[ConfigT], *, where: str) -> ConfigT:
    """Validate `values`. Raises ConfigError naming the first wrong key (and its nearest right one) or value."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        # In a union such as `str | Recipe` every branch complains; the one that got furthest into the values is meant.
        first = max(
            error.errors(),
            key=lambda item: (item["type"] == "extra_forbidden", len(item["loc"]), item["type"] != "string_type"),
        )
        key = _written_place(values, first["loc"], missing=first["type"] == "missing")
        place = f"{where}: {key}" if key else where
        others = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] == "extra_forbidden":
            name = str(first["loc"][-1])
            known = sorted(_keys_at(config_class, first["loc"][:-1]))
            new = RENAMED.get(name)
            near = [new] if new in known else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            todo = f"did you mean `{near[0]}`?" if near else f"the keys here are: {', '.join(known)}"
            raise ConfigError(f"unknown key `{name}`{others}", where=place, todo=todo) from error
        if first["type"] == "missing":
            about = _description(config_class, first["loc"])
            raise ConfigError(f"`{key}` is missing{others}", where=place, todo=f"add it{about}") from error
        message, todo = first["msg"].removeprefix("Value error, "), _meant(first) or "correct the value"
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, FieldError):
            raise ConfigError(f"{message}{others}", where=f"{place}: {cause.field}", todo=cause.todo) from error
        if not isinstance(first.get("input"), Mapping):
            value = repr(first.get("input"))
            message += f", not {value if len(value) < 80 else value[:77] + '...'}"
        raise ConfigError(f"{message}{others}", where=place, todo=todo) from error


def _meant(error: Any) -> str:
    """How to write what an error's value probably meant, where YAML reads it as another type."""
    value, kind = error.get("input"), error["type"]
    if kind in ("int_parsing", "float_parsing", "int_type", "float_type") and isinstance(value, str):
        with suppress(ValueError, OverflowError):
            number = int(value, 0) if value[:2].lower() in ("0o", "0x", "0b") else float(value.replace(",", ""))
            number = int(number) if kind.startswith("int") and number == int(number) else number
            return f"write {number}: YAML reads {value} as text"
    if kind in ("string_type", "literal_error") and isinstance(value, bool):
        return "put the word in quotes: YAML reads no, off, yes and on as false and true"
    if kind == "string_type" and isinstance(value, int | float | date):
        return f'put it in quotes: "{value}"'
    return ""


def _written_place(values: Any, path: Sequence[str | int], *, missing: bool) -> str:
    """An error's `path` as written in the file: the names of union branches that pydantic puts in are left out."""
    parts: list[str] = []
    for part in path:
        with suppress(TypeError, LookupError):
            values = values[part]
            parts.append(str(part))
    return ".".join([*parts, str(path[-1])] if missing else parts)


def _description(config_class: Any, path: Sequence[str | int]) -> str:
    """The description of the field at an error's `path`, if it has one, behind a colon."""
    fields = [
        cls.model_fields[path[-1]] for cls in _classes_at(config_class, path[:-1]) if path[-1] in cls.model_fields
    ]
    return next((f": {field.description}" for field in fields if field.description), "")


def _keys_at(config_class: Any, path: Sequence[str | int]) -> set[str]:
    return {name for cls in _classes_at(config_class, path) for name in cls.model_fields}


def _classes_at(config_class: Any, path: Sequence[str | int]) -> list[type[Config]]:
    """The config classes at the end of an error's `path`; list indices and union tags are passed over."""
    classes = [config_class]
    for part in path:
        fields = [cls.model_fields[part].annotation for cls in classes if part in cls.model_fields]
        if fields:
            classes = [cls for field in fields for cls in _config_classes(field)]
    return classes


def _config_classes(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation  # type: ignore[misc]
    else:
        for argument in get_args(annotation):
            yield from _config_classes(argument)


def load_config(path: str | Path, config_class: type[ConfigT], overrides: Sequence[str] = ()) -> ConfigT:
    """Read, override and validate one YAML file."""
    return parse_config(apply_overrides(load_yaml(path), overrides), config_class, where=str(path))


def result_part(config: Config) -> dict[str, Any]:
    """What the result depends on, as plain JSON-able values: every field but `runtime` (apart from the config's
    `runtime_in_result`), `tracking`, `validation` (which only looks on), locations, where it ends, and what has no
    effect."""
    runtime = config.runtime_in_result()
    part = _without_locations(config, skip={"runtime", "tracking", "validation"})
    return part | ({"runtime": runtime} if runtime else {})


def parameters(config: Config) -> dict[str, Any]:
    """The values that a job uses, nested as in its YAML, for MLflow: every field with an effect but `job` and
    `tracking`."""
    return {name: value for name, value in _used(config).items() if name not in ("job", "tracking")}


def _used(value: Any) -> Any:
    if isinstance(value, Config):
        names = type(value).model_fields.keys() - value.unused().keys() - value.unused_in_fingerprint().keys()
        return {name: _used(getattr(value, name)) for name in type(value).model_fields if name in names}
    if isinstance(value, list | tuple):
        return [_used(item) for item in value]
    return {key: _used(item) for key, item in value.items()} if isinstance(value, dict) else value


def _without_locations(value: Any, skip: frozenset[str] | set[str] = frozenset()) -> Any:
    if isinstance(value, Config):
        skip = skip | value.unused().keys()
        return {
            name: _without_locations(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if name not in skip
            and not {"location", EXTENDABLE} & (marks := {item for item in field.metadata if isinstance(item, str)})
            and not (LATER in marks and getattr(value, name) == field.default)
            and not _names_location(field.annotation)
        }
    if isinstance(value, list | tuple):
        return [_without_locations(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_locations(item) for key, item in value.items()}
    return value


def _names_location(annotation: Any) -> bool:
    return "location" in getattr(annotation, "__metadata__", ()) or any(map(_names_location, get_args(annotation)))


def canonical_json(value: Any) -> bytes:
    """Sorted, compact JSON: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def fingerprint_of(result: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what a result depends on."""
    return hashlib.sha256(canonical_json(result)).hexdigest()


def library_versions(*names: str) -> dict[str, str]:
    """Installed versions of the libraries that make a job's bytes."""
    return {name: version(name) for name in names}


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines `a.b: old -> new` for every leaf in which two JSON-able values differ; a long value is cut."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = ({str(index): value for index, value in enumerate(values)} for values in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        lines = (
            difference(old.get(key, ABSENT), new.get(key, ABSENT), f"{path}.{key}" if path else str(key))
            for key in keys
        )
        return [line for found in lines for line in found]
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
