import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from typing import get_args

import pytest

from runner import engines, schema, source
from runner.config import CONF
from runner.errors import ConfigError

TARGETS = sorted(
    set(engines.PLUGINS.values())
    | {
        match[1]
        for path in CONF.glob("*/*.yaml")
        if (match := re.search(r"^_target_: (\S+)", path.read_text(), re.MULTILINE))
    }
)


def load(target):
    module, name = target.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("target", TARGETS)
def test_fields_read_from_source_are_those_of_the_installed_class(target):
    cls = load(target)
    if (
        "__init__" in vars(cls)
        and cls.__init__.__qualname__.startswith(cls.__name__)
        and "kwargs" in str(inspect.signature(cls))
    ):
        real = [p.name for p in inspect.signature(cls).parameters.values() if p.kind != p.VAR_KEYWORD]
    else:
        real = [f.name for f in dataclasses.fields(cls) if f.init]
    assert sorted(schema.upstream_fields(target)) == sorted(real)


def test_reading_upstream_imports_no_torch():
    code = (
        "import sys; from runner import schema; schema.upstream_fields('trl.GRPOConfig');"
        "sys.exit(bool({'torch', 'transformers', 'trl'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_enum_is_read_as_its_values():
    assert set(get_args(schema.upstream_fields("trl.SFTConfig")["eval_strategy"].type)) == {
        "no",
        "steps",
        "epoch",
    }


def test_bases_tell_what_a_class_is():
    assert "TrainingArguments" in schema.bases_of("trl.experimental.orpo.ORPOConfig")
    assert "PeftConfig" in schema.bases_of("peft.LoraConfig")


@pytest.mark.parametrize(
    "target", ["trl.PPOConfig", "trl.experimental.orpo.NoConfig", "trl.experimental.ppo.PPOConfig"]
)
def test_a_class_that_the_installed_trl_lacks_is_refused_by_name_and_version(target):
    with pytest.raises(ConfigError, match=rf"trl \d+\.\d+\S* has no {target}"):
        schema.upstream_fields(target)


def test_the_removed_ppo_names_the_versions_that_had_it():
    with pytest.raises(ConfigError, match=r"trl <1\.13"):
        source.locate("trl.PPOConfig")


def test_keyword_fields_are_the_options_of_our_functions():
    assert schema.keyword_fields("rewards", "format")["pattern"].required
    assert schema.keyword_fields("arithmetic", "arithmetic")["train_rows"].type is int
    assert {"pattern", "target", "symbol"} & schema.keyword_fields("rewards").keys()
    with pytest.raises(ConfigError, match="exact_match"):
        schema.keyword_fields("rewards", "nonsense")
