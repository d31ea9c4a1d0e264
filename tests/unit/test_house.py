"""The house's own rules: layers, configs and the README's examples."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evaluation.config import EvaluateConfig
from infra.cluster.config import ClusterConfig
from infra.config import load_config, parse_config
from pipelines.sharding.config import ShardConfig
from training.config import TrainConfig

ROOT = Path(__file__).parents[2]
FLOORS = ("infra", "degradation", "training", "evaluation", "pipelines")
CONFIG_CLASSES = {"shard": ShardConfig, "train": TrainConfig, "evaluate": EvaluateConfig, "cluster": ClusterConfig}
README_CONFIGS = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_each_floor_imports_only_those_below():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    job = yaml.safe_load(path.read_text())["job"]
    assert load_config(path, CONFIG_CLASSES[job]).job == job


def test_the_commands_in_the_papers_configs_are_valid():
    """`ccsr JOB -c FILE --set ...` lines of their comments."""
    texts = [path.read_text() for path in (ROOT / "configs" / "paper").glob("*.yaml")]
    commands = [
        line for text in texts for line in re.findall(r"^#\s+ccsr (\w+) -c (\S+)(.*)$", text, flags=re.MULTILINE)
    ]
    assert len(commands) >= 5
    for job, file, rest in commands:
        overrides = [word for word in shlex.split(rest) if word != "--set"]
        if "..." not in overrides:
            load_config(ROOT / file, CONFIG_CLASSES[job], overrides)


def test_rooms_hold_at_most_twelve_entries_and_files_300_lines():
    """Beside `__init__.py`; of the files one may be longer."""
    folders = {path.parent for name in FLOORS for path in (ROOT / name).rglob("*.py")}
    rooms = {
        str(folder.relative_to(ROOT)): {
            entry.name
            for entry in folder.iterdir()
            if entry.name not in ("__init__.py", "__pycache__") and (entry.is_file() or any(entry.rglob("*.*")))
        }
        for folder in folders
    }
    assert {name: sorted(entries) for name, entries in rooms.items() if len(entries) > 12} == {}
    long = {name for name, text in sources_with("").items() if text.count("\n") > 300}
    assert long <= {"infra/config.py"}


def sources_with(pattern: str) -> dict[str, str]:
    """Path -> text of our modules in which `pattern` is found."""
    texts = {str(path.relative_to(ROOT)): path.read_text() for name in FLOORS for path in (ROOT / name).rglob("*.py")}
    return {name: text for name, text in texts.items() if re.search(pattern, text)}


def test_every_tag_that_we_set_in_mlflow_is_in_its_table():
    texts = sources_with(r'"ccsr\.').values()
    tags = {tag for text in texts for tag in re.findall(r'"(ccsr\.[a-z_]+)"', text)} - {"ccsr.json"}
    table = (ROOT / "docs" / "mlflow.md").read_text().partition("| tag |")[2].partition("##")[0]
    assert {tag for tag in tags if f"`{tag}`" not in table} == set()


def test_what_runs_networks_on_ray_sets_their_numerics():
    """`infra.process.ray_runtime.on_ray` asks its callers for them; whoever starts work otherwise does it itself."""
    without_networks = {"training/run/monitoring/board.py", "training/data/batches.py"}
    starting = sources_with(r"ray\.remote\(|ray\.data\.\w+\(|TorchTrainer\(")
    assert starting.keys() > without_networks
    for name in starting.keys() - without_networks:
        assert "set_numerics(" in starting[name], name


def test_free_memory_refuses_and_never_decides():
    """Doctor reports a card's; the two others raise. A new caller may do no more: see its docstring."""
    assert sources_with("mem_get_info|virtual_memory").keys() == {"infra/process/memory.py", "infra/cluster/doctor.py"}
    assert sources_with("free_memory").keys() == {
        "infra/process/memory.py",
        "training/run/cost/requirements.py",
        "training/restore/seeded_runs.py",
    }


def test_readme_shows_the_three_jobs_with_valid_yaml():
    jobs = [yaml.safe_load(text)["job"] for text in README_CONFIGS]
    assert jobs == ["shard", "train", "evaluate"]
    for text, job in zip(README_CONFIGS, jobs, strict=True):
        parse_config(yaml.safe_load(text), CONFIG_CLASSES[job], where="README.md")


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EMPTY_PHRASES = (
    r"\b(?:is|are|be|was|were) (?:told|had)\b",
    r"\btells? of\b",
    r"\b(?:stands?|stood|lies?|wants?|goes on|go on|mishaps?|strangers?)\b",
    r"\bof (?:its|their) own\b",
    r"\bfound pairs?\b",
    r"\bfor ever\b",
    r"\bby (?:itself|themselves)\b",
    r"\bmade of\b",
    r"\ba word\b",
    r"\bmend(?:s|ed|ing)?\b",
)


def test_links_of_the_pages_lead_to_files():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())]
    assert len(links) > 50
    assert not [(page.name, link) for page, link in links if not (page.parent / link).exists()]


def test_pages_docstrings_and_messages_use_no_empty_phrases():
    """Plainly: is reported, is stored, requires, resumes, repair, its own, forever, automatically."""
    texts = {str(page): page.read_text() for page in [*PAGES, *(ROOT / "benchmarks").glob("*.md")]}
    for path in (path for folder in (*FLOORS, "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts |= {
            f"{path}: {getattr(n, 'name', '')}": ast.get_docstring(n) or "" for n in nodes if isinstance(n, kinds)
        }
    for path in (path for folder in FLOORS for path in (ROOT / folder).rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        strings = [n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        texts |= {f"{path}:{n.lineno}:{n.col_offset}": n.value for n in strings}  # messages, and parts of f-strings
    assert len(texts) > 10000
    found = {name: m[0] for name, text in texts.items() if (m := re.search("|".join(EMPTY_PHRASES), text))}
    assert not found
