import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from test_models import batch, model_dir
from tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from runner.adapters import check_adapter, peft_for
from runner.config import CONF, build
from runner.errors import ConfigError
from runner.models import load_classifier, load_policy, load_tokenizer

__all__ = ["model_dir"]  # a fixture


@pytest.mark.parametrize(("trainer", "task"), [("reward", "SEQ_CLS"), ("sft", "CAUSAL_LM"), ("grpo", "CAUSAL_LM")])
def test_the_task_of_an_adapter_follows_the_trainer_and_the_config_stays_as_it_was(trainer, task):
    config = LoraConfig()
    assert peft_for(config, trainer=trainer).task_type == task
    assert config.task_type is None


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "peft").glob("*.yaml") if path.stem != "none"))
@pytest.mark.parametrize("trainer", ["sft", "reward"])
def test_every_adapter_option_trains_and_reloads(option, trainer, model_dir, tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = OmegaConf.to_container(compose(f"peft/{option}").peft)
    tokenizer = load_tokenizer(str(model_dir))
    load = load_classifier if trainer == "reward" else load_policy
    torch.manual_seed(0)
    config = peft_for(build(node), trainer=trainer)
    base = load(str(model_dir), tokenizer=tokenizer, adapter=True)
    check_adapter(base, config)
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = (model(input_ids=batch()).logits - 5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(str(model_dir), tokenizer=tokenizer), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=batch()).logits, model.eval()(input_ids=batch()).logits)


def test_a_target_that_matches_nothing_names_the_modules_that_exist(neox_dir):
    config = AutoConfig.from_pretrained(neox_dir)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"names k_proj, q_proj, which gpt_neox lacks.*query_key_value"):
        check_adapter(model, LoraConfig(target_modules=["q_proj", "k_proj", "query_key_value"]))
    with pytest.raises(ConfigError, match="which gpt_neox lacks"):
        check_adapter(model, LoraConfig(target_modules=r".*\.q_proj"))
    check_adapter(model, LoraConfig(target_modules=["query_key_value"]))
    check_adapter(model, LoraConfig(target_modules=r".*\.query_.*"))
    check_adapter(model, LoraConfig(target_modules="all-linear"))
    check_adapter(model, LoraConfig())  # peft knows what GPT-NeoX calls them


def test_the_output_layer_is_refused_as_a_target():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match="output layer"):
        check_adapter(tiny_model("llama", tokenizer), LoraConfig(target_modules=["q_proj", "lm_head"]))


def test_a_family_that_peft_does_not_know_needs_its_targets_typed():
    model = tiny_model("llama", tiny_tokenizer())
    model.config.model_type = "brand_new"
    with pytest.raises(ConfigError, match=r"no default for brand_new.*peft.target_modules=\["):
        check_adapter(model, LoraConfig())


def test_a_saved_adapter_reloads_on_a_grown_embedding(tmp_path):
    folder = save_tiny(tmp_path / "base", pad=False)
    tokenizer = load_tokenizer(str(folder))
    adapted = get_peft_model(
        load_policy(str(folder), tokenizer=tokenizer), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_policy(str(folder), tokenizer=tokenizer), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=batch()).logits, adapted.eval()(input_ids=batch()).logits)
