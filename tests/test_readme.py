import re
import shlex
from pathlib import Path

import pytest

from runner import compose, search
from runner.config import CONF, group_names, option_names

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
COMMANDS = [line.split("  #")[0].strip() for line in SHELL.splitlines() if line.startswith("python -m runner ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_readme_composes(command):
    words = [word for word in shlex.split(command)[3:] if not word.startswith("resume=")]  # which is no key
    arguments = compose.parse_arguments(words)
    search.read(arguments.overrides) if arguments.multirun else compose.compose(arguments.overrides)


def test_every_make_target_and_script_in_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", SHELL, re.MULTILINE) + re.findall(r"`make (\w+)`", README):
        assert f"\n{target}:" in makefile
    for script in re.findall(r"python (benchmarks/\w+\.py)", README):
        assert (ROOT / script).is_file()


def test_the_tree_in_the_readme_names_every_module():
    assert {path.name for path in (ROOT / "runner").glob("[!_]*.py")} - {"errors.py"} <= set(
        re.findall(r"\w+\.py", README)
    )


@pytest.mark.parametrize("group", [name for name in group_names() if (CONF / name).is_dir() and name != "hydra"])
def test_the_readme_names_every_option(group):
    row = next(line for line in README.splitlines() if line.startswith(f"| `{group}` |"))
    assert set(option_names(group)) <= set(re.findall(r"`([\w.]+)`", row))


def test_the_readme_is_short_and_starts_with_a_command():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert any("make demo" in line for line in lines[:20])
