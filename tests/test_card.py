import json

import pytest
import yaml

from runner import manifest
from runner.card import write_card


def card_of(run_dir, *, trainer="sft", model="Qwen/Qwen2.5-0.5B-Instruct", dataset=None, peft="lora", **options):
    """Write a run of the given choices and return the front matter and the text of its card."""
    (run_dir / "model").mkdir(parents=True)
    if peft != "none":
        (run_dir / "model" / "adapter_config.json").write_text("{}")
    config = {
        "trainer": {
            "_target_": f"trl.{trainer.upper()}Config",
            "learning_rate": 0.001,
            "warmup_steps": None,
            **options,
        },
        "model": {"name_or_path": model},
        "dataset": {"path": dataset} if dataset else {"generator": "arithmetic"},
        "peft": None if peft == "none" else {"_target_": "peft.LoraConfig", "r": 16},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    choices = {"trainer": trainer, "model": "m", "dataset": "arithmetic", "peft": peft}
    manifest.create(run_dir, argv=[], choices=choices)
    lines = [
        {"step": step, "index": 0, "prompt": "p", "completion": "c", "scores": {"exact_match": step / 20}}
        for step in (0, 10)
    ]
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_card(run_dir)
    text = (run_dir / "model" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_card_says_base_training_result_and_how_to_load(tmp_path):
    front, body = card_of(tmp_path / "run", dataset="trl-lib/tldr")
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["trl", "sft", "lora"],
        "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
        "base_model_relation": "adapter",
        "datasets": ["trl-lib/tldr"],
    }
    assert "from peft import AutoPeftModelForCausalLM as Model" in body
    assert "learning_rate: 0.001" in body
    assert "| exact_match | 0 | 0.5 |" in body
    assert "The weights derive from Qwen/Qwen2.5-0.5B-Instruct: its licence applies" in body


def test_full_weights_and_a_reward_model_are_loaded_as_what_they_are(tmp_path):
    front, body = card_of(tmp_path / "full", peft="none")
    assert (front["library_name"], front["base_model_relation"]) == ("transformers", "finetune")
    assert "from transformers import AutoModelForCausalLM as Model" in body
    front, body = card_of(tmp_path / "reward", trainer="reward")
    assert front["pipeline_tag"] == "text-classification"
    assert "from peft import AutoPeftModelForSequenceClassification as Model" in body


def test_the_embedded_model_is_called_what_it_is(tmp_path):
    front, _ = card_of(tmp_path / "run", model="embedded:smollm135m")
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("local", ["{folder}/secret-place/mymodel", "relative/mymodel"])
def test_a_local_base_gives_no_base_model_and_no_path_away(tmp_path, monkeypatch, local):
    monkeypatch.chdir(tmp_path)
    model = local.format(folder=tmp_path)
    (tmp_path / model).mkdir(parents=True)
    front, body = card_of(
        tmp_path / "run", model=model, dataset=f"{tmp_path}/rows.jsonl", chat_template_path="/x/y/t.jinja"
    )
    assert "base_model" not in front
    assert "datasets" not in front
    assert "`mymodel`, a local model" in body
    assert str(tmp_path) not in body
    assert "secret-place" not in body
    assert "chat_template_path: t.jinja" in body


def test_nothing_unknown_is_called_none(tmp_path):
    front, body = card_of(tmp_path / "run", model=None)
    assert "base_model" not in front
    assert "None" not in body
    assert "null" not in body
