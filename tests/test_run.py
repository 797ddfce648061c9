"""Whole runs on tiny models: what a person does, and what they find afterwards."""

import json
import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from commands import run as command
from safetensors.torch import load_file
from tiny import save_tiny

from runner import compose, manifest
from runner.__main__ import write_run
from runner.config import option_names
from runner.errors import ConfigError, RunStopped
from runner.prefix_sharing import TRAINERS
from runner.run import publish, run

SMALL = [
    "dataset.train_rows=16",
    "dataset.eval_rows=4",
    "dataset.max_value=9",
    "samples.rows=2",
    "samples.max_new_tokens=4",
]
QUICK = ["trainer.max_steps=2", "trainer.warmup_steps=0", "trainer.logging_steps=1"]
BATCH = ["trainer.per_device_train_batch_size=4", "trainer.per_device_eval_batch_size=4"]
ONLINE = {"grpo", "rloo", "ppo"}


def start(tmp_path, *overrides, data=SMALL, name="run"):
    """Compose, check and run like ``python -m runner``; returns the run directory and the metrics."""
    composed = compose.compose([*data, *QUICK, *BATCH, *overrides, f"output_dir={tmp_path / name}"])
    run_dir = compose.claim(composed.run_dir)
    write_run(run_dir, composed.config, composed.choices, list(overrides))
    return run_dir, run(run_dir)


def extras(trainer):
    """The settings that make a trainer small, and give random models something to learn from."""
    if trainer not in ONLINE:
        return []
    groups = [] if trainer == "ppo" else ["trainer.num_generations=2"]
    return ["reward=unique_chars", *groups, "trainer.max_completion_length=6"]


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir):
    return [line["loss"] for line in lines(run_dir) if "loss" in line]


def reload(run_dir, peft, trainer):
    """Load what was saved with transformers and peft alone."""
    import peft as peft_library
    import transformers

    reward = trainer == "reward"
    if peft == "none":
        cls = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    else:
        cls = peft_library.AutoPeftModelForSequenceClassification if reward else peft_library.AutoPeftModelForCausalLM
    labels = {"num_labels": 1} if reward else {}
    return cls.from_pretrained(run_dir / "model", **labels)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama_dir", "neox_dir"])
@pytest.mark.parametrize("peft", ["none", "lora"])
@pytest.mark.parametrize("trainer", option_names("trainer"))
def test_every_trainer_trains_saves_and_reloads(trainer, peft, kind, request, tmp_path):
    base = request.getfixturevalue(kind)
    run_dir, metrics = start(
        tmp_path, f"trainer={trainer}", f"model.name_or_path={base}", f"peft={peft}", "trainer.learning_rate=1e-2",
        "model.trust_remote_code=true", *extras(trainer),
    )  # fmt: skip
    assert len(losses(run_dir)) == 2
    assert all(math.isfinite(loss) for loss in losses(run_dir))
    assert math.isfinite(metrics["eval_objective/scores" if trainer == "ppo" else "eval_loss"])
    record = manifest.read(run_dir)
    assert record["status"] == "completed"
    assert not record.keys() - set(re.findall(r"^    (\w+): ", manifest.__doc__, re.MULTILINE))
    for name in (
        "config.yaml",
        "samples.jsonl",
        "report.html",
        "curves.png",
        "model/README.md",
        "checkpoints/checkpoint-2",
    ):
        assert (run_dir / name).exists() or (trainer == "reward" and name == "samples.jsonl"), name

    saved = load_file(run_dir / "model" / ("model.safetensors" if peft == "none" else "adapter_model.safetensors"))
    if peft == "lora":
        assert any(tensor.abs().sum() > 0 for key, tensor in saved.items() if "lora_B" in key)
        assert trainer != "reward" or any("score" in key for key in saved)
    else:
        before = load_file(base / "model.safetensors")
        assert any(not torch.equal(tensor, saved[key]) for key, tensor in before.items() if key in saved)
    state = reload(run_dir, peft, trainer).state_dict()
    wanted = {key.replace("lora_B.weight", "lora_B.default.weight"): tensor for key, tensor in saved.items()}
    shared = [key for key in wanted if key in state and (peft == "none" or "lora_B" in key)]
    assert len(shared) > 5
    for key in shared:
        torch.testing.assert_close(state[key], wanted[key])


@pytest.mark.slow
def test_lora_leaves_the_base_as_it_was(llama_dir, tmp_path):
    before = (llama_dir / "model.safetensors").read_bytes()
    run_dir, _ = start(tmp_path, f"model.name_or_path={llama_dir}", "trainer.learning_rate=1e-2")
    assert (llama_dir / "model.safetensors").read_bytes() == before
    assert all("lora" in key for key in load_file(run_dir / "model" / "adapter_model.safetensors"))


@pytest.mark.slow
def test_wandb_is_told_of_the_end_since_ranks_and_trials_end_without_exit_handlers(llama_dir, tmp_path, monkeypatch):
    run_dir, _ = start(tmp_path, f"model.name_or_path={llama_dir}")
    told = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(finish=lambda: told.append(True))))
    publish(run_dir, SimpleNamespace(args=SimpleNamespace(push_to_hub=False)))
    assert told == [True]


@pytest.mark.slow
def test_what_the_last_step_evaluated_is_not_evaluated_again(llama_dir, tmp_path):
    run_dir, metrics = start(
        tmp_path, f"model.name_or_path={llama_dir}", "trainer.eval_strategy=steps", "trainer.eval_steps=1"
    )
    assert [line["step"] for line in lines(run_dir) if "eval_loss" in line] == [0, 1, 2]
    assert {"eval_loss", "eval_exact_match"} <= set(metrics)


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["none", "lora"])
@pytest.mark.parametrize("trainer", sorted(TRAINERS))
def test_rows_whose_beginnings_are_read_once_teach_the_same(tmp_path, llama_dir, monkeypatch, trainer, peft):
    rows = [{"prompt": "what " * (n % 5 + 1), "chosen": "is it" * (n % 3 + 1), "rejected": "no"} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = [f"trainer={trainer}", f"model.name_or_path={llama_dir}", f"peft={peft}", "trainer.learning_rate=1e-2"]
    given += ["dataset=local", f"dataset.path={tmp_path / 'rows.jsonl'}", "dataset.eval=train[:4]", "samples.rows=0"]
    online = ["reward=unique_chars", "trainer.num_generations=2", "trainer.max_completion_length=8"]
    given += online if trainer in ("grpo", "rloo") else []
    run_dir, _ = start(tmp_path, *given, data=[])
    monkeypatch.setattr("runner.estimate.SAVES", 0)  # as if it never paid
    whole, _ = start(tmp_path, *given, data=[], name="whole")
    found, plain = (manifest.read(one)["speed"]["prefix_sharing"] for one in (run_dir, whole))
    assert found["shared"] == found["passes"] == plain["passes"] > 0 == plain["shared"]
    assert found["read"] < 0.9 * plain["read"]
    for one, other in zip(lines(run_dir), lines(whole), strict=True):
        clocks = ("runtime", "second", "step_time")
        numbers = [k for k in other if isinstance(other[k], float) and not any(clock in k for clock in clocks)]
        assert [one[key] for key in numbers] == pytest.approx([other[key] for key in numbers], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_rows_are_read_alone_where_that_is_asked(llama_dir, tmp_path):
    told = {}
    for shares in ("true", "false"):
        given = [f"model.name_or_path={llama_dir}", f"share_prefixes={shares}", "trainer.max_steps=1"]
        told[shares] = manifest.read(start(tmp_path, *given, name=shares)[0])
    assert told["true"]["speed"]["prefix_sharing"]["shared"] > 0
    assert "prefix_sharing" not in told["false"]["speed"]
    assert told["true"]["memory"]["activations"] < told["false"]["memory"]["activations"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_curve_bit_for_bit(llama_dir, tmp_path):
    curves = [losses(start(tmp_path, f"model.name_or_path={llama_dir}", name=name)[0]) for name in "ab"]
    other = losses(start(tmp_path, f"model.name_or_path={llama_dir}", "seed=1", name="c")[0])
    assert curves[0] == curves[1] != other


@pytest.mark.slow
def test_accumulation_does_not_change_the_loss(llama_dir, tmp_path):
    base = [f"model.name_or_path={llama_dir}", "trainer.max_steps=3"]
    whole, _ = start(tmp_path, *base, "trainer.per_device_train_batch_size=4", name="whole")
    parts, _ = start(
        tmp_path, *base, "trainer.per_device_train_batch_size=1", "trainer.gradient_accumulation_steps=4", name="parts"
    )
    assert losses(parts) == pytest.approx(losses(whole), abs=2e-4)  # logs are rounded to four digits


@pytest.mark.slow
def test_the_saved_tokenizer_gives_the_tokens_of_the_training(tmp_path):
    from transformers import AutoTokenizer

    from runner.models import load_tokenizer

    bare = save_tiny(tmp_path / "bare", "llama", chat=False, pad=False)
    run_dir, _ = start(tmp_path, f"model.name_or_path={bare}")
    trained, saved = load_tokenizer(str(bare)), AutoTokenizer.from_pretrained(run_dir / "model")
    chat = [{"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": "3"}]
    assert saved.apply_chat_template(chat) == trained.apply_chat_template(chat)
    assert saved.pad_token == trained.pad_token != saved.eos_token


@pytest.mark.slow
@pytest.mark.parametrize("option", [o for o in option_names("peft") if o != "none"])
def test_every_adapter_trains(option, llama_dir, tmp_path):
    run_dir, _ = start(tmp_path, f"model.name_or_path={llama_dir}", f"peft={option}")
    record = manifest.read(run_dir)
    assert 0 < record["trainable_parameters"] < record["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["nf4", "int8"])
def test_quantized_weights_train_under_an_adapter(option, llama_dir, tmp_path):
    run_dir, _ = start(tmp_path, f"model.name_or_path={llama_dir}", f"quantization={option}", "trainer=dpo")
    assert all(math.isfinite(loss) for loss in losses(run_dir))


@pytest.mark.slow
@pytest.mark.parametrize("peft", [["peft=randlora"], ["peft=lora", "peft.modules_to_save=[embed_tokens]"]])
def test_answers_are_sampled_as_they_are_scored_where_adapters_in_float32_meet_weights_in_bfloat16(
    peft, llama_dir, tmp_path
):
    mixed = ["quantization=nf4", "model.dtype=bfloat16", "trainer.bf16=true"]
    run_dir, _ = start(tmp_path, "trainer=grpo", f"model.name_or_path={llama_dir}", *extras("grpo"), *peft, *mixed)
    assert all(math.isfinite(loss) for loss in losses(run_dir))


@pytest.mark.slow
def test_rewards_are_summed_and_a_model_may_be_one_of_them(llama_dir, neox_dir, tmp_path):
    judge, _ = start(tmp_path, "trainer=reward", "peft=none", f"model.name_or_path={neox_dir}", name="judge")
    run_dir, _ = start(
        tmp_path, "trainer=grpo", f"model.name_or_path={llama_dir}", *extras("grpo")[1:], "reward=sum",
        "reward.terms.tidy.weight=0.5", "+reward@reward.terms.judge=model",
        "model@reward.terms.judge.model=pythia160m", f"reward.terms.judge.model.name_or_path={judge / 'model'}",
    )  # fmt: skip
    logged = {key for line in lines(run_dir) for key in line if key.startswith("rewards/")}
    assert {"rewards/right/mean", "rewards/tidy/mean"} <= logged
    assert len([key for key in logged if key.endswith("/mean")]) == 3


@pytest.mark.slow
def test_a_ppo_run_keeps_its_value_function_and_shows_what_it_sampled(llama_dir, tmp_path):
    run_dir, _ = start(tmp_path, "trainer=ppo", f"model.name_or_path={llama_dir}", *extras("ppo"))
    assert (run_dir / "model" / "value" / "value_head.safetensors").is_file()
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert {line["rollout"] for line in samples if "rollout" in line} == {0}
    assert all(line["scores"].keys() == {"unique_chars"} for line in samples)


@pytest.mark.slow
def test_what_ppo_cannot_train_is_refused_before_weights_load(llama_dir, tmp_path):
    without_weights = tmp_path / "model"
    shutil.copytree(llama_dir, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    refused = {
        "A rollout takes 32 prompts and the dataset has 16": ["trainer.per_device_train_batch_size=16"],
        "choose peft=lora": ["peft=none", "trainer.value_mode=adapter"],
    }
    for number, (message, overrides) in enumerate(refused.items()):
        with pytest.raises(ConfigError, match=message):
            start(tmp_path, "trainer=ppo", f"model.name_or_path={without_weights}", *overrides, name=str(number))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["trainer.lr_scheduler_type=cosine_with_min_lr"], "One of min_lr or min_lr_rate should be set"),
        (["trainer.lr_scheduler_type=warmup_stable_decay"], "argument: 'num_decay_steps'"),
        (["trainer.lr_scheduler_kwargs={num_cycle: 2}"], "lr_scheduler_type=linear cannot go with .* 'num_cycle'"),
        (["trainer.lr_scheduler_type=polynomial", "trainer.lr_scheduler_kwargs={lr_end: 1.0}"], "smaller than initial"),
    ],
)
def test_a_schedule_that_cannot_be_made_is_refused_before_weights_load(words, why, llama_dir, tmp_path):
    without_weights = tmp_path / "model"
    shutil.copytree(llama_dir, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ConfigError, match=why):
        start(tmp_path, f"model.name_or_path={without_weights}", *words)


@pytest.mark.slow
def test_a_value_model_of_another_vocabulary_is_refused(llama_dir, tmp_path):
    from transformers import AutoTokenizer

    other = save_tiny(tmp_path / "other", "neox")
    tokenizer = AutoTokenizer.from_pretrained(other)
    swapped = json.loads((other / "tokenizer.json").read_text())
    vocabulary = swapped["model"]["vocab"]
    first, second = [token for token in vocabulary if token not in tokenizer.all_special_tokens][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(ConfigError, match="2 tokens, such as"):
        start(
            tmp_path, "trainer=ppo", f"model.name_or_path={llama_dir}", *extras("ppo"), "trainer.value_mode=separate",
            "model@value_model=pythia160m", f"value_model.name_or_path={other}",
        )  # fmt: skip


@pytest.mark.slow
def test_a_reward_model_without_a_score_head_is_warned_of_and_recorded(llama_dir, neox_dir, tmp_path, caplog):
    run_dir, _ = start(
        tmp_path, "trainer=ppo", f"model.name_or_path={llama_dir}", *extras("ppo")[1:], "reward=model",
        "model@reward.model=pythia160m", f"reward.model.name_or_path={neox_dir}",
    )  # fmt: skip
    assert "is no reward model" in caplog.text
    assert manifest.read(run_dir)["untrained_rewards"] == [str(neox_dir)]


@pytest.mark.slow
def test_a_reward_that_raises_stops_the_run_with_the_completion(llama_dir, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def broken(completions, **kwargs):\n    return [1 / 0 for _ in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [
        "trainer=grpo",
        f"model.name_or_path={llama_dir}",
        *extras("grpo")[1:],
        "reward.function=my_rewards.broken",
    ]
    with pytest.raises(ConfigError, match=r"allow_code=\[my_rewards.broken\]"):
        start(tmp_path, *overrides, name="refused")
    with pytest.raises(RunStopped, match="ZeroDivisionError"):
        start(tmp_path, *overrides, "allow_code=[my_rewards.broken]", name="allowed")
    record = manifest.read(tmp_path / "allowed")
    assert record["status"] == "failed"
    assert "completion:" in record["cause"]


@pytest.mark.slow
def test_planted_secrets_reach_no_file_of_a_run(llama_dir, tmp_path):
    secrets = {"HF_TOKEN": "hf_" + "x1" * 17, "WANDB_API_KEY": "0123456789abcdef" * 3, "MY_PASSWORD": "open sesame"}
    (tmp_path / "leaks.py").write_text(
        "import logging, os\n"
        "def leak(completions, **kwargs):\n"
        "    said = ' '.join(os.environ[name] for name in ('HF_TOKEN', 'WANDB_API_KEY', 'MY_PASSWORD'))\n"
        "    logging.warning('https://me:hunter22@example.org/ %s', said)\n"
        "    if kwargs['trainer_state'].global_step: raise RuntimeError(said + ' https://me:hunter22@example.org/')\n"
        "    return [float(len(str(c))) for c in completions]\n"
    )
    words = [
        *("trainer=grpo", f"model.name_or_path={llama_dir}", *SMALL, *QUICK, *BATCH, *extras("grpo")[1:]),
        *("reward.function=leaks.leak", "allow_code=[leaks.leak]", "output_dir=it"),
        "trainer.run_name=https://me:hunter22@example.org/",
    ]
    where = {**os.environ, **secrets, "PYTHONPATH": str(tmp_path)}
    options = {"cwd": tmp_path, "env": where, "first": f"import sys; sys.path.insert(0, {str(tmp_path)!r})"}
    code, said = command(*words, **options)
    assert code == 2, said  # the name is written to disk
    code, said = command(*words[:-1], **options)
    assert code == 1, said
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith("leaks.")]
    assert {"manifest.json", "runner.log", "config.yaml"} <= {path.name for path in files}
    for secret in [*secrets.values(), "hunter22"]:
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_a_run_without_a_single_step_is_not_completed(llama_dir, tmp_path):
    options = ["trainer=grpo", f"model.name_or_path={llama_dir}", *extras("grpo"), "trainer.num_generations=8"]
    with pytest.raises(RunStopped, match="not one step was taken: 2 rows do not fill a batch"):
        start(tmp_path, *options, "dataset.train_rows=2", "trainer.per_device_train_batch_size=32")


@pytest.mark.slow
def test_a_run_that_diverges_is_stopped_with_its_cause(llama_dir, tmp_path):
    with pytest.raises(RunStopped, match="not finite"):
        start(
            tmp_path, f"model.name_or_path={llama_dir}", "peft=none", "trainer.learning_rate=1e20",
            "trainer.max_grad_norm=0", "trainer.max_steps=6",
        )  # fmt: skip
    assert manifest.read(tmp_path / "run")["status"] == "failed"


def test_bad_rows_are_refused_before_any_weights_load(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    with pytest.raises(ConfigError, match=r"rows.jsonl:2: completion is empty"):
        start(
            tmp_path,
            "dataset=local",
            f"dataset.path={rows}",
            "dataset.eval=null",
            "model.name_or_path=no/such",
            data=[],
        )


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in option_names("experiment") if name.startswith("article")])
def test_a_recipe_runs_on_local_folders(recipe, llama_dir, neox_dir, tmp_path):
    tldr = [{"prompt": f"Post {i}", "completion": f" Short {i}"} for i in range(600)]
    pairs = [{"prompt": f"Tell {i}", "chosen": f" a red {i}", "rejected": f" a {i}"} for i in range(600)]
    write_jsonl(tmp_path / "rows" / "train.jsonl", tldr)
    write_jsonl(tmp_path / "rows" / "validation.jsonl", tldr)
    write_jsonl(tmp_path / "rows" / "descriptiveness.jsonl", pairs)
    base = neox_dir if "ppo" in recipe else llama_dir
    short = {"article_grpo": extras("grpo")[1:], "article_ppo": extras("ppo")[1:]}.get(recipe, [])
    if recipe == "article_ppo":
        judge, _ = start(tmp_path, "trainer=reward", "peft=none", f"model.name_or_path={neox_dir}", name="judge")
        short.append(f"reward.model.name_or_path={judge / 'model'}")
    run_dir, _ = start(
        tmp_path, f"experiment={recipe}", f"model.name_or_path={base}", f"dataset.path={tmp_path / 'rows'}", *short,
        data=["samples.rows=2", "samples.max_new_tokens=4"],
    )  # fmt: skip
    assert manifest.read(run_dir)["data"]["train"]["rows_kept"] == 500


@pytest.mark.slow
def test_what_a_person_can_mend_ends_with_exit_code_2_and_no_traceback(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes('{"text": "你好"}'.encode("gb18030"))
    code, said = command("dataset=local", "dataset.path=rows.jsonl", "dataset.eval=null", cwd=tmp_path)
    assert code == 2
    assert "iconv" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_guard_ends_a_run_with_exit_code_1(llama_dir, tmp_path):
    words = [f"model.name_or_path={llama_dir}", *SMALL, *BATCH, "peft=none", "trainer.learning_rate=1e20"]
    code, said = command(*words, "trainer.max_grad_norm=0", "trainer.warmup_steps=0", cwd=tmp_path)
    assert code == 1
    assert "Traceback" not in said
