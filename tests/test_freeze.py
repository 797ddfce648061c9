import math
import shlex
import shutil

import pytest
import yaml
from commands import run as command
from test_run import extras, start

from runner import compose, leaderboard, manifest
from runner.__main__ import write_run
from runner.config import CONF, flat
from runner.errors import ConfigError
from runner.freeze import freeze, unexpected
from runner.leaderboard import Row


@pytest.fixture
def conf(tmp_path, monkeypatch):
    """A copy of the options, so that recipes can be written."""
    copy = tmp_path / "conf"
    shutil.copytree(CONF, copy)
    return copy


def made(tmp_path, *overrides, **where):
    composed = compose.compose([*overrides, f"output_dir={tmp_path / 'run'}"], **where)
    run_dir = compose.claim(composed.run_dir)
    write_run(run_dir, composed.config, composed.choices, list(overrides))
    return run_dir


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ([], {}),
        (["seed=7"], {"seed": 7}),
        (["trainer=dpo", "trainer.beta=0.3"], {"trainer.beta": 0.3}),
        (["experiment=article_ppo", "peft.r=4"], None),
        (["dataset=local", "dataset.path=[a.jsonl,b.jsonl]", "dataset.train=train[:90%]"],
         {"dataset.path": ["a.jsonl", "b.jsonl"], "dataset.train": "train[:90%]"}),
        (["trainer=grpo", "reward=sum", "reward.terms.tidy.weight=0.5"], {"reward.terms.tidy.weight": 0.5}),
    ],
)  # fmt: skip
def test_a_frozen_recipe_composes_to_the_same_config_and_holds_only_the_differences(tmp_path, conf, overrides, kept):
    run_dir = made(tmp_path, *overrides)
    path = freeze(run_dir, "mine", conf / "experiment")
    again = compose.compose(["experiment=mine"], config_dir=str(conf)).config
    before = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert flat({**again, "output_dir": ""}) == flat({**before, "output_dir": ""})
    recipe = yaml.safe_load(path.read_text())
    assert kept is None or flat({k: v for k, v in (recipe or {}).items() if k != "defaults"}) == kept
    assert "# python -m runner experiment=mine" in path.read_text()


def test_what_a_recipe_cannot_say_is_refused_and_leaves_no_file(tmp_path, conf):
    run_dir = made(tmp_path, "trainer=grpo", "reward=sum", "~reward@reward.terms.tidy")
    with pytest.raises(ConfigError, match="no recipe can say"):
        freeze(run_dir, "mine", conf / "experiment")
    assert not (conf / "experiment" / "mine.yaml").exists()


def test_a_run_of_a_persons_own_options_is_frozen_beside_them_and_in_its_sweep(tmp_path):
    mine = tmp_path / "mine"
    (mine / "trainer").mkdir(parents=True)
    (mine / "trainer" / "gentle.yaml").write_text("defaults:\n  - sft\n  - _self_\nlearning_rate: 1.0e-6\n")
    run_dir = made(tmp_path, "trainer=gentle", "seed=7", config_dir=str(mine))
    path = freeze(run_dir, "tried", config_dir=str(mine))
    assert path == mine / "experiment" / "tried.yaml"
    assert f"# python -m runner --config-dir={mine} experiment=tried" in path.read_text()
    again = compose.compose(["experiment=tried"], config_dir=str(mine)).config
    assert (again["seed"], again["trainer"]["learning_rate"]) == (7, 1e-6)
    with pytest.raises(ConfigError, match="exists already"):
        freeze(run_dir, "article_sft", config_dir=str(mine))  # which would go before it
    row = Row(0, "completed", "", {}, {}, 1, 1.0, run_dir)
    assert leaderboard.write_best(tmp_path, row, str(mine)) is None
    assert (tmp_path / "best.yaml").read_text() == path.read_text().replace("tried", "best")


def test_a_metric_that_was_no_number_is_not_expected_and_meets_nothing(tmp_path, conf):
    run_dir = made(tmp_path, "seed=7")
    manifest.update(run_dir, metrics={"eval_loss": math.nan, "eval_exact_match": 0.5})
    recipe = yaml.safe_load(freeze(run_dir, "mine", conf / "experiment").read_text())
    assert list(recipe["expect"]) == ["eval_exact_match"]
    assert unexpected({"expect": {"eval_loss": [0, 1]}}, {"eval_loss": None}) == [
        "eval_loss is missing, expected 0 to 1"
    ]


def test_a_command_to_paste_says_where_its_options_are():
    assert shlex.join(compose.command(["seed=1"])) == "python -m runner seed=1"
    where = {"config_dir": "my conf", "config_name": "mine"}
    told = shlex.join(compose.command(["seed=1"], **where))
    assert told == "python -m runner '--config-dir=my conf' --config-name=mine seed=1"


@pytest.mark.parametrize("name", ["article_sft", "My-Recipe", "../up"])
def test_a_name_that_is_taken_or_none_is_refused(tmp_path, conf, name):
    with pytest.raises(ConfigError, match=r"exists already|cannot name a recipe"):
        freeze(made(tmp_path), name, conf / "experiment")


def test_what_a_recipe_expects_is_met_within_its_bounds_only():
    config = {"expect": {"eval_loss": [0.9, 1.1], "eval_exact_match": [0.5, 0.5]}}
    assert unexpected(config, {"eval_loss": 1.1, "eval_exact_match": 0.5}) == []
    assert unexpected(config, {"eval_loss": 1.11, "eval_exact_match": math.nan}) == [
        "eval_loss is 1.11, expected 0.9 to 1.1",
        "eval_exact_match is nan, expected 0.5 to 0.5",
    ]
    assert unexpected({"expect": {"eval_loss": [0, 1]}}, {}) == ["eval_loss is missing, expected 0 to 1"]


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["check_expected=true"], "needs something to expect"),
        (["expect={eval_loss: [2, 1]}"], "lowest and the highest value"),
        (["expect={eval_loss: 1}"], "expect takes"),
    ],
)
def test_expectations_that_say_nothing_are_refused(overrides, answer):
    with pytest.raises(ConfigError, match=answer):
        compose.compose(overrides)


@pytest.mark.slow
def test_a_frozen_run_can_be_run_again_and_compared(llama_dir, tmp_path, conf):
    run_dir, metrics = start(tmp_path, f"model.name_or_path={llama_dir}", *extras("sft"))
    path = freeze(run_dir, "mine", conf / "experiment", tolerance=0.01)
    low, high = yaml.safe_load(path.read_text())["expect"]["eval_loss"]
    assert low < metrics["eval_loss"] < high
    assert high - low == pytest.approx(0.02 * metrics["eval_loss"], rel=0.01)
    given = [f"--config-dir={conf}", "experiment=mine", "check_expected=true"]
    code, said = command(*given, cwd=tmp_path)
    assert code == 0, said
    assert "All metrics are as expected" in said
    code, said = command(*given, "trainer.learning_rate=1e-6", cwd=tmp_path)
    assert code == 1, said
    assert "not as expected: eval_loss is" in said


@pytest.mark.slow
def test_a_recipe_says_what_its_run_gave(llama_dir, tmp_path, conf):
    run_dir, metrics = start(tmp_path, f"model.name_or_path={llama_dir}", *extras("sft"))
    text = freeze(run_dir, "mine", conf / "experiment").read_text()
    assert f"eval_loss {metrics['eval_loss']:.4g}" in text
    assert manifest.read(run_dir)["result_sha256"][:12] in text
