"""The schema of the config, read by a validator that knows nothing of us."""

import jsonschema
import pytest
import yaml

from runner import compose
from runner.config import CONF, option_names
from runner.editor import json_schema


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def faults(validator, config):
    return [error.message for error in validator.iter_errors(config)]


@pytest.mark.parametrize("recipe", option_names("experiment"))
def test_every_recipe_is_valid_as_written_and_as_composed(recipe, validator):
    assert faults(validator, yaml.safe_load((CONF / "experiment" / f"{recipe}.yaml").read_text())) == []
    assert faults(validator, compose.compose([f"experiment={recipe}"]).config) == []


@pytest.mark.parametrize("group", ["trainer", "model", "dataset", "peft", "reward", "samples", "launch"])
def test_a_misspelt_key_is_refused(group, validator):
    config = compose.compose(["trainer=dpo"]).config
    config[group]["learning_rat"] = 1
    assert faults(validator, config)


def test_a_misspelt_key_of_a_class_is_named(validator):
    config = compose.compose(["trainer=dpo"]).config
    config["trainer"]["bta"] = 0.1
    assert "'bta' was unexpected" in faults(validator, config)[0]


def test_a_wrong_type_is_refused_and_an_interpolation_is_not(validator):
    assert faults(validator, {"seed": "many"})
    assert faults(validator, {"trainer": {"seed": "${seed}", "max_steps": 3}}) == []


def test_the_choices_that_a_class_names_are_offered_and_no_others(validator):
    offered = json_schema()["$defs"]["trl.SFTConfig"]["properties"]["packing_strategy"]["anyOf"]
    assert {"enum": ["bfd", "bfd_split", "wrapped"]} in offered
    config = compose.compose(["trainer=sft", "trainer.packing=true", "trainer.packing_strategy=wrapped"]).config
    assert faults(validator, config) == []
    config["trainer"]["packing_strategy"] = "wraped"
    assert faults(validator, config)


def test_keys_are_described():
    schema = json_schema()
    assert "rank" in schema["$defs"]["peft.LoraConfig"]["properties"]["r"]["description"]
    assert "completions" in schema["$defs"]["runner.ppo.PPOConfig"]["properties"]["total_episodes"]["description"]
    assert "everything" in schema["properties"]["seed"]["description"]
