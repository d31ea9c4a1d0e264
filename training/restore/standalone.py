"""Python files that run a model without this project: `CcsrPipeline` and whatever it uses, taken from source."""

import ast
import functools
import importlib
from importlib import metadata
from pathlib import Path
from typing import Any

from training.config import FAMILIES
from training.method import METHODS
from training.models.build import MODELS
from training.restore.pipeline import BESIDE, SAMPLING

OURS = ("infra", "training")
SHARED = ("infra", "training.sampling", "training.method")  # what sampling.py holds
_METHOD = {"color_epsilon", "tile_stride", "fits", "condition", "sample"}
# Of these classes only what restoring uses; of the others everything.
KEPT = {
    "CcsrModel": {"factor", "prompt", "embedding", "encode_condition", "denoiser", "decode", "_predict"},
    "StableSrModel": {"decode", "_predict"},
    "OneStepModel": {"_predict"},
    **dict.fromkeys(("CcsrV1", "CcsrV2", "StableSr", "OneStep"), _METHOD),
}
UNUSED = {"for_unet", "for_vae"}
HEADER = """Super-resolution with a trained CCSR, StableSR or OSEDiff model, written by `ccsr export --to diffusers`.

from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(OUT, custom_pipeline=OUT, trust_remote_code=True)
pipeline(image=image, seed=0).images[0].save("large.png")
"""
ERRORS = """
if tuple(map(int, diffusers.__version__.split(".")[:2])) < {version}:
    raise ImportError(
        f"diffusers {{diffusers.__version__}} is too old for this pipeline\\n"
        f"  where: {{diffusers.__file__}}\\n  do: pip install -U 'diffusers>={text}'"
    )


class ConfigError(ValueError):
    def __init__(self, what, *, where, todo):
        super().__init__(f"{{what}}\\n  where: {{where}}\\n  do: {{todo}}")


DataError = ModelError = ConfigError
"""
GIVEN = {"ConfigError", "DataError", "ModelError", "METHODS", "SAMPLING"}


def pipeline_sources(family: str) -> dict[str, str]:
    """The files for models of `family`: pipeline.py, sampling.py and, of StableSR, networks.py; it imports the others.

    Without docstrings, comments and annotations: the sources have them.
    """
    method, model = type(METHODS[family]), MODELS[family]
    beside = {FAMILIES[family].adapter, FAMILIES[family].decoder} & set(BESIDE)
    networks, chain = _Collection(model.__name__), _Collection(model.__name__)
    if beside:
        networks.add("training.restore.pipeline", "BESIDE")
    chain.add(model.__module__, model.__name__)
    chain.add(method.__module__, method.__name__)
    chain.add("training.restore.pipeline", "CcsrPipeline", given=("BESIDE",))
    version = tuple(map(int, metadata.version("diffusers").split(".")[:2]))
    errors = ERRORS.format(version=version, text=".".join(map(str, version)))
    given = f"METHODS = {{{family!r}: {method.__name__}()}}\nSAMPLING = {SAMPLING!r}"
    shared = [name for name, module in chain.modules.items() if module.startswith(SHARED)]
    own = [name for name in chain.modules if name not in shared]
    used = sorted({*chain.names(own), "METHODS", "SAMPLING"} & {*shared, *GIVEN})
    imports = f"from .sampling import {', '.join(used)}"
    imports += "\nfrom .networks import BESIDE" if beside else "\nBESIDE = {}"
    files = {
        "pipeline.py": chain.text(own, HEADER, imports),
        "sampling.py": chain.text(shared, "Noise, schedules, samplers, tiles, colours.", errors, given),
    }
    other = networks.text(list(networks.modules), "Networks of StableSR that diffusers lacks.")
    return files | ({"networks.py": other} if beside else {})


class _Collection:
    """Definitions in an order in which they can be executed, and the imports of other packages that they need."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._nodes: dict[str, ast.stmt] = {}
        self._imports: dict[str, tuple[str, str]] = {"diffusers": ("", "diffusers")}
        self.modules: dict[str, str] = {}

    def add(self, module: str, name: str, given: tuple[str, ...] = ()) -> None:
        """What defines `name` of `module`, after what it uses."""
        definitions, sources = _module(module)
        if name in self._nodes or name in (*GIVEN, *given):
            return
        if name in definitions:
            node = _Slim(self._model).visit(ast.parse(ast.unparse(definitions[name])).body[0])
            self._nodes[name] = ast.Pass()  # names that use each other are functions, whose order is free
            for used in _names(node):
                self.add(module, used, given)
            del self._nodes[name]
            self._nodes[name], self.modules[name] = node, module
        elif name in sources:
            origin, original = sources[name]
            if origin.split(".")[0] in OURS:
                self.add(origin, original, given)
            else:
                self._imports[name] = (origin if original else "", original or origin)

    def names(self, definitions: list[str]) -> set[str]:
        """What these definitions use."""
        return {name for definition in definitions for name in _names(self._nodes[definition])}

    def text(self, names: list[str], header: str, before: str = "", after: str = "") -> str:
        """A file with some of the definitions."""
        chosen = [self._nodes[name] for name in self._nodes if name in names]
        used = {"diffusers", *self.names(names)}
        groups: dict[str, list[ast.alias]] = {}
        for name, (origin, original) in sorted(self._imports.items()):
            if name in used:
                groups.setdefault(origin, []).append(ast.alias(original, None if name == original else name))
        imports: list[ast.stmt] = [ast.Import([alias]) for alias in groups.pop("", [])]
        imports += [ast.ImportFrom(origin, aliases, 0) for origin, aliases in groups.items()]
        head = "\n".join(ast.unparse(ast.fix_missing_locations(node)) for node in imports)
        body = "\n\n".join(ast.unparse(ast.fix_missing_locations(node)) for node in chosen)
        return "\n\n".join(part for part in (f'"""{header}"""', head, before.strip(), body, after) if part) + "\n"


def _names(node: ast.AST) -> list[str]:
    return [child.id for child in ast.walk(node) if isinstance(child, ast.Name)]


@functools.cache
def _module(module: str) -> tuple[dict[str, ast.stmt], dict[str, tuple[str, str]]]:
    """What a module defines, and what it imports: name -> (module, name there)."""
    file = Path(str(importlib.import_module(module).__file__))
    definitions: dict[str, ast.stmt] = {}
    sources: dict[str, tuple[str, str]] = {}
    found = ast.parse(file.read_text()).body
    for node in [inner for outer in found for inner in (outer.body if isinstance(outer, ast.With) else [outer])]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            definitions |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                sources[alias.asname or alias.name] = (node.module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                sources[(alias.asname or alias.name).split(".")[0]] = (alias.name, "")
    return definitions, sources


class _Slim(ast.NodeTransformer):
    """Without annotations, docstrings, dataclass machinery and methods that restoring does not call."""

    def __init__(self, model: str) -> None:
        self._model = model

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        kept = KEPT.get(node.name)
        node.body = [item for item in node.body if _is_kept(item, kept)]
        if kept is not None:
            node.decorator_list = []
        if node.name == "CcsrPipeline":
            node.bases[-1] = ast.Name(self._model, ast.Load())
        return self._without_docstring(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        constructor = node.name == "__init__"  # diffusers reads the types of a pipeline's parts there
        for argument in [*node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]:
            if argument is not None and not (constructor and "Model" in ast.unparse(argument.annotation or node.args)):
                argument.annotation = None
        return self._without_docstring(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        return None if node.value is None else ast.Assign([node.target], node.value)

    def _without_docstring(self, node: Any) -> ast.AST:
        if ast.get_docstring(node) is not None and node.name != "__call__":
            node.body = node.body[1:] or [ast.Pass()]
        self.generic_visit(node)
        return node


def _is_kept(item: ast.stmt, kept: set[str] | None) -> bool:
    names = {item.name} if isinstance(item, ast.FunctionDef) else set()
    if isinstance(item, ast.Assign):
        names = {target.id for target in item.targets if isinstance(target, ast.Name)}
    if kept is None:
        return not names & UNUSED
    return bool(names & kept) or isinstance(item, ast.Expr)
