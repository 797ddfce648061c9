import importlib
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from runner import compose, manifest, trainer_source
from runner.__main__ import help_page, prepare, write_run
from runner.config import find_idle
from runner.errors import ConfigError


def refusal(*overrides, **options):
    with pytest.raises(ConfigError) as error:
        compose.compose(list(overrides), **options)
    return str(error.value)


def write_recipe(folder, text):
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    return {"config_dir": str(folder)}


def test_a_field_that_the_file_does_not_name_is_set_without_plus():
    config = compose.compose(["trainer.adam_beta2=0.95", "peft.use_rslora=true"]).config
    assert config["trainer"]["adam_beta2"] == 0.95
    assert config["peft"]["use_rslora"] is True


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["trainer=dpo", "trainer.bta=0.2"], "did you mean trainer.beta (group trainer)"),
        (["trainer.max_seq_length=9"], "use trainer.max_length"),
        (["trainer.evaluation_strategy=no"], "use trainer.eval_strategy"),
        (["learning_rate=1"], "did you mean trainer.learning_rate"),
        (["modle=qwen0.5b"], "did you mean model="),
        (["model.nam_or_path=x"], "did you mean model.name_or_path"),
        (["trainer.lora_alpha=3"], "did you mean peft.lora_alpha"),
        (["trainer=sft", "trainer.beta=0.1"], "trainer=dpo"),
        (["peft=none", "peft.r=3"], "peft=none"),
        (["dataset.max_vlue=3"], "did you mean dataset.max_value"),
        (["reward=format", "reward.patern=x"], "did you mean reward.pattern"),
        (
            ["+reward.terms.a.function=length", "reward.terms.a.wieght=1"],
            "did you mean reward.terms.a.weight",
        ),
        (["trainer=ppo", "model@value_model=pythia160m", "value_model.nam_or_path=x"], "value_model.name_or_path"),
        (["samples.row=3"], "did you mean samples.rows"),
        (["hydra.run.dri=x"], "did you mean hydra.run.dir"),
        (["trainer=dpoo"], "did you mean trainer=dpo"),
        (["experiment=article_sfd"], "did you mean experiment=article_sft"),
        (["trainer.output_dir=x"], "Use output_dir="),
        (["trainer.betta=0.1"], "did you mean trainer.beta, which"),
        (["model.name=x"], "did you mean model.name_or_path"),
        (["trainer.foo=1"], "nothing has a similar name"),
        (["peft.alpha=32"], "use peft.lora_alpha"),
    ],
)
def test_a_wrong_key_is_refused_with_the_nearest_right_one(overrides, answer):
    message = refusal(*overrides)
    assert answer in message
    assert "+" not in message.replace("++", "")


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("trainer.learning_rate=fast", "takes float, found 'fast'"),
        ("trainer.per_device_train_batch_size=0", "per_device_train_batch_size=0 must be at least 1"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("max_seconds=0", "max_seconds=0 must be at least 0.001"),
        ("trainer.learning_rate=-1e-5", "learning_rate=-1e-05 must be at least 0"),
        ("trainer.weight_decay=-0.1", "weight_decay=-0.1 must be at least 0"),
        ("trainer.dataloader_num_workers=-1", "dataloader_num_workers=-1 must be at least 0"),
        ("peft.r=0", "peft.r=0 must be at least 1"),
        ("trainer.max_steps=1.5", "takes int, found 1.5"),
        ("trainer.eval_strategy=sometimes", "no | steps | epoch"),
        ("trainer.bf16=3", "takes bool"),
        ("model.dtype=float8", "bfloat16"),
        ("dataset.bad_rows=ignore", "'fail', 'drop'"),
        ("peft.target_modules=3", "target_modules takes"),
        ("dataset.train_rows=many", "takes int"),
        ("seed=null", "seed takes int"),
        ("dataset.sources=[1,2]", "dataset.sources takes dict[str, Any], found [1, 2]"),
        ("reward.terms=true", "reward.terms takes dict[str, Any], found True"),
        ("peft=[1,2]", "The config cannot be composed"),
        ("hydra/launcher=null", "The config cannot be composed"),
    ],
)
def test_a_wrong_type_says_what_was_expected(override, answer):
    assert answer in refusal(override)


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (
            ["trainer=dpo", "trainer.loss_type=[ipo,sigmod]"],
            "loss_type=sigmod is nothing that trl.DPOConfig knows: did ",
        ),
        (["trainer=grpo", "trainer.loss_type=sigmoid"], "Its source names bnpo, cispo, dapo, dr_grpo, grpo"),
        (["trainer=sft", "trainer.packing=true", "trainer.packing_strategy=bdf"], "did you mean bfd?"),
        (["trainer=cpo", "trainer.loss_type=kto_pair"], "It can be sigmoid, hinge, ipo, simpo, alphapo."),
    ],
)
def test_a_word_that_the_trainer_does_not_know_is_refused_with_those_it_knows(overrides, answer):
    assert answer in refusal(*overrides)


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo", "rloo", "kto", "reward", "orpo", "cpo", "ppo"])
def test_no_word_that_upstream_takes_by_itself_is_refused(trainer):
    target = compose.compose([f"trainer={trainer}"]).config["trainer"]["_target_"]
    module, _, name = target.rpartition(".")
    words = {field.name: field.default for field in fields(getattr(importlib.import_module(module), name))}
    words = {key: value for key, value in words.items() if isinstance(value, str)}
    assert trainer_source.find_unknown({"_target_": target, **words}) == []


def test_a_word_that_upstream_names_anywhere_may_be_known():
    assert (
        trainer_source.find_unknown({"_target_": "trl.DPOConfig", "loss_type": ["sigmoid", "alpha_divergence"]}) == []
    )


@pytest.mark.parametrize(
    "overrides", [["trainer=grpo"], ["trainer=ppo"], ["trainer=ppo", "peft=none", "trainer.value_mode=shared"]]
)
def test_a_value_model_that_nothing_would_use_is_refused(overrides):
    assert "value_model has no effect" in refusal(*overrides, "model@value_model=pythia160m")


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("dataset.weight=0.5", "dataset.weight has no effect without dataset.sources"),
        ("dataset.stopping_strategy=all_exhausted", "dataset.stopping_strategy has no effect"),
    ],
)
def test_a_key_without_effect_is_refused(override, answer):
    assert answer in refusal(override)


@pytest.mark.parametrize("mode", ["MULTIRUN", "RUN"])
def test_only_the_command_line_starts_a_sweep(mode):
    assert refusal(f"hydra.mode={mode}") == "hydra.mode is refused: a sweep is started on the command line, with -m."


def test_no_steps_at_all_are_said_to_mean_epochs():
    config = compose.compose(["trainer.max_steps=0"]).config
    assert find_idle(config, ["trainer.max_steps"]) == [
        "trainer.max_steps has no effect: 0 is as -1: epochs tell the length."
    ]
    assert find_idle(compose.compose(["trainer.max_steps=3"]).config, ["trainer.max_steps"]) == []


def test_a_run_says_and_records_what_was_typed_without_effect(tmp_path, caplog):
    composed = compose.compose(words := ["trainer.eval_steps=50"])
    write_run(tmp_path, composed.config, composed.choices, words)
    text = "trainer.eval_steps has no effect: trainer.eval_strategy is not steps."
    assert manifest.read(tmp_path)["no_effect"] == [text]
    assert text in caplog.messages


def test_a_secret_is_refused_by_its_key_and_not_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    secret = "hf_" + "a1" * 17
    message = refusal(f"trainer.run_name={secret}", "trainer.bta=1")
    assert "trainer.run_name holds what looks like a secret" in message
    assert "trainer.beta" in message  # beside all other faults
    with pytest.raises(ConfigError, match=r"^hydra\.job\.env_set\.WANDB_PROJECT holds what looks like a secret"):
        prepare([f"+hydra.job.env_set.WANDB_PROJECT={secret}"])
    assert secret not in message


def test_a_probe_is_refused_where_others_would_wait_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"they would wait. Type python -m runner\.check"):
        prepare(["probe=true"])
    assert not (tmp_path / "outputs").exists()


def test_an_evaluation_without_rows_is_refused():
    message = refusal("trainer.eval_strategy=epoch", "dataset=local", "dataset.path=rows.jsonl", "dataset.eval=null")
    assert "trainer.eval_strategy=epoch needs held-out rows" in message


@pytest.mark.parametrize("overrides", [["peft=none"], ["trainer.value_mode=separate"]])
def test_a_value_model_goes_with_a_value_function_of_its_own(overrides):
    composed = compose.compose(["trainer=ppo", "model@value_model=pythia160m", *overrides])
    assert composed.config["value_model"]["name_or_path"] == "EleutherAI/pythia-160m"


def test_all_faults_come_at_once():
    message = refusal("trainer.bta=1", "model.dtype=float8", "peft.rr=2")
    assert message.startswith("3 faults:")
    assert all(path in message for path in ("trainer.bta", "model.dtype", "peft.rr"))


def test_a_group_that_is_no_group_in_a_recipe_is_one_fault(tmp_path):
    message = refusal("experiment=mine", **write_recipe(tmp_path, "trainer: 3\n"))
    assert message == "trainer must be a group of keys, found 3. Choose one: trainer=..."


def test_a_key_of_the_sweeper_in_a_recipe_is_refused(tmp_path):
    message = refusal("experiment=mine", **write_recipe(tmp_path, "hydra:\n  sweeper:\n    n_trials: 3\n"))
    assert message.startswith("hydra.sweeper.n_trials does not exist")
    assert "search.n_trials" in message


def test_a_misspelt_key_in_a_recipe_is_refused_too(tmp_path):
    where = write_recipe(tmp_path, "defaults:\n  - override /trainer: dpo\ntrainer:\n  bta: 0.2\n")
    assert "did you mean trainer.beta" in refusal("experiment=mine", **where)


def test_a_recipe_that_is_no_yaml_names_its_line(tmp_path):
    where = write_recipe(tmp_path, "trainer: [1, 2\nseed: 3\n")
    assert "line" in refusal("experiment=mine", **where)


def test_a_missing_value_says_what_to_type():
    assert "dataset.path" in refusal("dataset=local")


def test_a_run_directory_is_never_taken_twice(tmp_path):
    names = [compose.claim(tmp_path / "run").name for _ in range(3)]
    assert names == ["run", "run_2", "run_3"]


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_a_directory_that_cannot_get_a_number_is_refused(place):
    with pytest.raises(ConfigError, match="a run makes a directory of its own"):
        compose.claim(Path(place))


@pytest.mark.parametrize("name", ["a (b)", "a,b", "~a#b=c", "目录", "it's", "a{b}"])
def test_a_folder_of_options_may_be_called_anything(name, tmp_path):
    (tmp_path / name / "model").mkdir(parents=True)
    (tmp_path / name / "model" / "mine.yaml").write_text("name_or_path: mine\n")
    assert compose.compose(["model=mine"], config_dir=str(tmp_path / name)).config["model"]["name_or_path"] == "mine"


@pytest.mark.parametrize(("word", "left"), [("peft=null", {}), ("quantization=null", {}), ("search=null", None)])
def test_null_chooses_no_option_of_a_group(word, left):
    assert compose.compose([word]).config.get(word.partition("=")[0]) == left
    assert "model must be a group of keys" in refusal(word, "model=null")  # which has to be one


def test_a_folder_of_options_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="typo cannot be used: there is no such folder"):
        compose.compose(["trainer=dpo"], config_dir=str(tmp_path / "typo"))


@pytest.mark.parametrize("spec", ["train[:500]", "train+validation[:90%]", "a[90%:]+b", "a[1:2]+b+c[-3:]"])
def test_a_slice_is_typed_without_quotes(spec):
    assert compose.compose([f"dataset.train={spec}"]).config["dataset"]["train"] == spec


def test_overrides_may_stand_on_both_sides_of_an_option():
    assert compose.parse_arguments(["seed=1", "-m", "trainer=sft,dpo"]).overrides == [
        "seed=1",
        "trainer=sft,dpo",
    ]


def test_a_mistyped_option_is_refused():
    with pytest.raises(ConfigError, match="--multirn"):
        compose.parse_arguments(["--multirn", "seed=1"])


def test_help_lists_a_persons_own_options_and_shows_the_config_of_a_sweep(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name_or_path: mine\n")
    words = ["--config-dir", str(tmp_path), "-m", "trainer=dpo", "trainer.beta=0.1,0.2", "--help"]
    lines = help_page(compose.parse_arguments(words)).splitlines()
    assert "mine" in next(line for line in lines if line.startswith("  model: ")).split(", ")
    assert "  _target_: trl.DPOConfig" in lines


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--cfg", "job"], ["-sc", "query=bash"], ["trainer=dpo", "trainer.bta=0.2"]]
)
def test_what_is_answered_at_once_imports_nothing_that_takes_long(arguments, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, atexit\nslow = {'torch', 'pydantic', 'optuna', 'matplotlib', 'ray'}\n"
        "atexit.register(lambda: sys.stderr.write(f'SLOW {sorted(slow & set(sys.modules))}'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"COMP_LINE": "runner trainer=", "COMP_POINT": "15"}  # what a shell asks completions with
    done = subprocess.run(
        [sys.executable, "-m", "runner", *arguments],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert "SLOW []" in done.stderr
    assert "query=bash" not in arguments or "trainer=ppo" in done.stdout.split()
    assert "--help" not in arguments or (
        "peft: dora, lora" in done.stdout and "\n  generator: arithmetic" in done.stdout
    )
    assert done.returncode == (2 if "trainer.bta=0.2" in arguments else 0)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["resume=no/such"], "it has no manifest.json"),
        (["resume=auto"], "type output_dir="),
        (["resume.allow_changes=true"], "has no effect without resume="),
        (["resume=a", "model=qwen0.5b"], "model=qwen0.5b cannot be typed here"),
        (["-m", "resume=a", "seed=1,2"], "goes on with one run"),
    ],
)
def test_a_resume_that_cannot_be_is_refused(words, answer, tmp_path, monkeypatch):
    from runner.__main__ import find_resumed

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(answer)):
        find_resumed(words)


def test_a_run_that_does_not_exist_yet_begins_with_resume_auto(tmp_path):
    from runner.__main__ import find_resumed

    assert find_resumed(["resume=auto", f"output_dir={tmp_path / 'new'}"]) is None
