"""Every option of every group composes, and what it names can be built."""

import re

import pytest

from runner import compose
from runner.config import CONF, build, group_names, option_names

OPTIONS = [(group, option) for group in group_names() if group != "hydra" for option in option_names(group)]
NEEDS = {
    ("dataset", "local"): ["dataset.path=rows.jsonl"],
    ("reward", "model"): ["model@reward.model=pythia160m"],
    ("dataset", "mix"): ["+dataset@dataset.sources.a=arithmetic"],
}
UNTYPED = re.compile(r"\b(None|True|False)\b")


def composed(group, option):
    return compose.compose([f"{group}={option}", *NEEDS.get((group, option), [])]).config


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    assert group == "experiment" or isinstance(composed(group, option)[group], dict)


@pytest.mark.parametrize(("group", "option"), [o for o in OPTIONS if o[0] in {"trainer", "peft", "quantization"}])
def test_every_class_that_an_option_names_can_be_built(group, option, tmp_path):
    node = composed(group, option)[group]
    if node:
        extra = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False} if group == "trainer" else {}
        assert type(build(node, **extra)).__name__ == node["_target_"].rsplit(".", 1)[-1]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_file_says_what_it_is(group, option):
    lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
    header = [line for line in lines if line.startswith("#") and not line.startswith("# @package")]
    assert len(header) >= 1
    assert lines[0].startswith("#")
    assert not UNTYPED.search("\n".join(line.split("#")[0] for line in lines))


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONF)))
def test_only_recipes_are_global(path):
    assert ("@package _global_" in path.read_text()) == (path.parent.name == "experiment")


@pytest.mark.parametrize("option", option_names("experiment"))
def test_a_recipe_shows_its_command(option):
    assert f"python -m runner experiment={option}" in (CONF / "experiment" / f"{option}.yaml").read_text()
