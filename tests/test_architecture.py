"""What keeps the house small: imports, sizes, and the words that must not be in it."""

import ast
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "runner").glob("*.py"))

# Who may import whom; a module that is not named imports nothing of ours but errors.
IMPORTS = {
    "__init__": {"lean"},
    "engines": {"errors", "hardware"},
    "__main__": {"compose", "config", "console", "errors", "freeze", "launch", "lean", "manifest", "redaction",
                 "resume", "run", "search"},
    "console": {"errors", "redaction"},
    "launch": {"engines", "errors", "hardware", "lean", "manifest"},
    "lean": {"disk", "embedded", "errors", "hub", "safety"},
    "preemption": {"callbacks", "errors", "launch", "manifest"},
    "search": {"compose", "config", "errors", "journal", "launch", "lean", "remote", "safety", "schema",
               "trainer_source"},
    "sweep": {"compose", "errors", "journal", "launch", "leaderboard", "manifest", "remote", "search", "trials"},
    "trials": {"__main__", "compose", "errors", "hardware", "launch", "lean", "manifest", "remote"},
    "remote": {"compose", "config", "errors", "launch"},
    "leaderboard": {"disk", "errors", "freeze", "manifest", "report"},
    "pruning": {"callbacks", "errors", "journal", "manifest"},
    "resume": {"config", "disk", "errors", "manifest", "safety"},
    "freeze": {"compose", "config", "errors", "manifest"},
    "replay": {"__main__", "compose", "config", "errors", "manifest", "reference", "safety"},
    "check": {"checkup", "compose", "config", "editor", "engines", "errors", "exhibit", "findings", "launch", "lean",
              "prospect", "reach"},
    "checkup": {"compose", "config", "findings", "launch", "views"},
    "exhibit": {"checkup", "config", "data", "encoding", "errors", "findings", "models", "rewards", "tokens",
                "trainers"},
    "prospect": {"callbacks", "checkup", "config", "console", "engines", "estimate", "findings", "foresight",
                 "hardware", "manifest", "reach", "trainers"},
    "foresight": {"adapters", "config", "estimate", "hardware", "models", "prefix_sharing", "reach", "skeleton"},
    "reach": {"embedded", "errors", "hub", "splits"},
    "skeleton": {"adapters", "disk", "embedded", "errors", "estimate", "hardware", "hub", "models", "prefix_sharing"},
    "editor": {"config", "engines", "errors", "schema"},
    "compose": {"config", "errors", "safety"},
    "config": {"engines", "errors", "formats", "redaction", "schema", "trainer_source", "views"},
    "trainer_source": {"schema", "source"},
    "schema": {"errors", "source"},
    "source": {"disk", "embedded", "errors"},
    "run": {"card", "checkpoints", "config", "console", "data", "errors", "estimate", "findings", "foresight",
            "hardware", "launch", "lean", "manifest", "models", "preemption", "prepared", "pruning", "report",
            "tokens", "trainers", "views"},
    "checkpoints": {"disk", "errors", "manifest"},
    "findings": {"rows"},
    "trainers": {"adapters", "batching", "callbacks", "config", "engines", "errors", "evaluation", "hardware",
                 "lm_head", "models", "prefix_sharing", "prepared", "reference", "rewards", "trainer_source"},
    "ppo": {"actor_critic", "errors", "rl_math", "roles", "rollout", "sampling"},
    "roles": {"actor_critic", "errors", "sampling"},
    "rollout": {"actor_critic", "errors", "rl_math", "sampling"},
    "actor_critic": {"errors", "rl_math"},
    "evaluation": {"errors", "sampling"},
    "sampling": {"errors", "rl_math"},
    "data": {"arithmetic", "errors", "files", "formats", "rows", "splits", "tables", "views"},
    "splits": {"errors", "files", "hub", "rows"},
    "files": {"errors", "rows"},
    "formats": {"errors", "rows"},
    "views": {"errors", "rows"},
    "tables": {"rows"},
    "tokens": {"data", "encoding", "errors"},
    "encoding": {"rendering", "rows"},
    "rendering": {"errors", "rows"},
    "lm_head": {"prefix_sharing", "trainer_source"},
    "prefix_sharing": {"estimate", "trainer_source"},
    "prepared": {"batching", "data", "encoding", "reference", "trainer_source"},
    "reference": {"encoding", "journal", "launch", "manifest"},
    "embedded": {"disk", "errors"},
    "models": {"disk", "embedded", "errors", "hardware", "hub"},
    "rehearsal": {"report"},
    "manifest": {"disk", "errors", "redaction"},
    "report": {"config", "curves", "errors", "manifest", "resume"},
    "card": {"report"},
}  # fmt: skip


def imported(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "runner":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("runner."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_a_module_imports_only_what_its_place_allows(path):
    assert imported(path) <= IMPORTS.get(path.stem, {"errors"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) <= (600 if path.stem == "ppo" else 450)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.stem}.{node.name}"


def lines_of_code(path):
    """Count lines that are no docstring, comment or blank."""
    text = path.read_text()
    prose = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and n not in prose for n, line in lines)


def test_the_library_stays_small():
    assert sum(map(lines_of_code, SOURCES)) < 10_800


def test_run_is_a_table_of_contents():
    function = next(
        node
        for node in ast.parse((ROOT / "runner" / "run.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "run"
    )
    branches = [n for n in ast.walk(function) if isinstance(n, ast.If | ast.IfExp | ast.For | ast.While | ast.Try)]
    assert function.end_lineno - function.lineno < 60
    assert len(branches) <= 5
    names = {path.stem for path in (ROOT / "conf" / "trainer").glob("[!_]*.yaml")}
    constants = {n.value for n in ast.walk(function) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not names & constants


@pytest.mark.parametrize(
    "module",
    [
        "__main__",
        "check",
        "compose",
        "config",
        "editor",
        "estimate",
        "schema",
        "safety",
        "errors",
        "formats",
        "rewards",
        "search",
        "sweep",
    ],
)
def test_what_runs_before_the_checks_imports_no_heavy_library(module):
    code = (
        f"import sys, runner.{module};"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_constraints_pin_everything_that_is_needed_and_agree_with_pyproject():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    needed, queue = {}, [("runner", "test"), ("runner", "")]
    while queue:
        name, extra = queue.pop()
        for text in requires(name) or []:
            wanted = Requirement(text)
            key = canonicalize_name(wanted.name)
            if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
                continue
            if name == "torch" and key.startswith(("cuda-", "nvidia-", "triton")):  # of the build for GPUs
                continue
            assert key in pins, f"{key}, needed by {name}, is not pinned"
            assert wanted.specifier.contains(pins[key], prereleases=True), f"{name} wants {wanted}, pinned {pins[key]}"
            assert version(key).split("+")[0] == pins[key], f"{key}: installed and pinned differ"
            for wanted_extra in {"", *wanted.extras}:
                if (key, wanted_extra) not in needed:
                    needed[key, wanted_extra] = True
                    queue.append((key, wanted_extra))
