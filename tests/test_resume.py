"""Runs that end early and go on: with what they had, or not at all."""

import json
import re
import signal
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from commands import Command
from omegaconf import OmegaConf
from safetensors.torch import load_file
from test_run import BATCH, SMALL, extras, start
from transformers import TrainerCallback

from runner import checkpoints, manifest, resume, trainers
from runner.config import option_names
from runner.errors import ConfigError, RunPreempted, RunStopped
from runner.run import run

pytestmark = pytest.mark.slow
CLOCKS = ("seconds", "time/", "train_runtime", "train_samples", "train_steps", "eval_runtime", "eval_samples",
          "eval_steps", "step_time")  # fmt: skip


class Killed(BaseException):
    """Ends a process where it stands, as far as a test can see."""


class Bomb(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def long(trainer):
    """Six optimizer steps, saved every two, logged every three, with dropout and an evaluation on the way."""
    return [
        f"trainer={trainer}", "trainer.max_steps=6", "trainer.save_strategy=steps", "trainer.save_steps=2",
        "trainer.logging_steps=3", "trainer.learning_rate=1e-2", "peft.lora_dropout=0.1",
        "trainer.eval_strategy=steps", "trainer.eval_steps=3", *extras(trainer),
    ]  # fmt: skip


def killed_at(monkeypatch, step):
    """Let trainings end without a word after a step, until the next call or undo."""
    monkeypatch.undo()
    build = trainers.build_trainer

    def build_with_bomb(*args, **kwargs):
        trainer = build(*args, **kwargs)
        trainer.add_callback(Bomb(step))
        return trainer

    monkeypatch.setattr(trainers, "build_trainer", build_with_bomb)


def logged(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKS)} for line in lines]


@pytest.mark.parametrize("trainer", option_names("trainer"))
def test_a_run_that_is_killed_and_goes_on_ends_as_if_it_had_not_been(trainer, llama_dir, tmp_path, monkeypatch):
    options = [*long(trainer), f"model.name_or_path={llama_dir}"]
    whole, metrics = start(tmp_path, *options, name="whole")
    killed_at(monkeypatch, 3)  # after checkpoint 2, which is between two logs
    with pytest.raises(Killed):
        start(tmp_path, *options, name="parts")
    killed_at(monkeypatch, 5)
    with pytest.raises(Killed):
        run(tmp_path / "parts")
    monkeypatch.undo()
    resumed = run(tmp_path / "parts")
    assert logged(tmp_path / "parts") == logged(whole)
    assert {k: v for k, v in resumed.items() if not k.startswith(CLOCKS)} == {
        k: v for k, v in metrics.items() if not k.startswith(CLOCKS)
    }
    one, other = (load_file(d / "model" / "adapter_model.safetensors") for d in (whole, tmp_path / "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert (tmp_path / "parts" / "samples.jsonl").exists() == (whole / "samples.jsonl").exists()
    if (whole / "samples.jsonl").exists():
        assert (tmp_path / "parts" / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


GROUPED = "trainer.train_sampling_strategy=group_by_length"


@pytest.mark.parametrize("words", ["grpo", "ppo", "sft", f"sft {GROUPED}", f"dpo {GROUPED}", f"orpo {GROUPED}"])
def test_later_epochs_keep_their_order(words, llama_dir, tmp_path, monkeypatch):
    trainer, *order = words.split()
    options = [
        *long(trainer),
        *order,
        f"model.name_or_path={llama_dir}",
        "trainer.max_steps=12",
    ]  # the second epoch begins at 8
    whole, _ = start(tmp_path, *options, name="whole")
    killed_at(monkeypatch, 11)
    with pytest.raises(Killed):
        start(tmp_path, *options, name="parts")
    monkeypatch.undo()
    run(tmp_path / "parts")
    assert logged(tmp_path / "parts") == logged(whole)


@pytest.mark.parametrize("trainer", ["sft", "reward", "grpo"])
def test_a_run_that_is_killed_after_its_last_step_takes_no_other(trainer, llama_dir, tmp_path, monkeypatch):
    options = [
        *long(trainer),
        f"model.name_or_path={llama_dir}",
        "trainer.lr_scheduler_type=constant",
        "trainer.logging_steps=4",  # so that there is something left to log
    ]
    whole, _ = start(tmp_path, *options, name="whole")

    def killed(*args):
        raise Killed

    monkeypatch.setattr(trainers, "evaluate", killed)
    with pytest.raises(Killed):
        start(tmp_path, *options, name="parts")
    monkeypatch.undo()
    run(tmp_path / "parts")
    assert logged(tmp_path / "parts") == logged(whole)
    one, other = (manifest.read(d)["result_sha256"] for d in (whole, tmp_path / "parts"))
    assert one == other


def test_completions_in_hand_are_part_of_a_checkpoint(llama_dir, tmp_path, monkeypatch):
    options = [*long("grpo"), f"model.name_or_path={llama_dir}", "trainer.steps_per_generation=4"]
    whole, _ = start(tmp_path, *options, name="whole")
    killed_at(monkeypatch, 3)
    with pytest.raises(Killed):
        start(tmp_path, *options, name="parts")
    monkeypatch.undo()
    run(tmp_path / "parts")
    assert logged(tmp_path / "parts") == logged(whole)


def test_a_deadline_ends_a_run_with_a_checkpoint_at_its_step(llama_dir, tmp_path):
    with pytest.raises(RunPreempted, match=r"max_seconds=0\.001 is near, at step 1") as ended:
        start(tmp_path, *long("sft"), f"model.name_or_path={llama_dir}", "max_seconds=0.001")
    assert ended.value.code == 143
    record = manifest.read(tmp_path / "run")
    assert record["status"] == "preempted"
    assert checkpoints.find_fault(tmp_path / "run" / "checkpoints" / "checkpoint-1") is None
    assert not (tmp_path / "run" / "model").exists()
    assert resume.prepare(tmp_path / "run", {"max_seconds": None}, allow_changes=False)
    run(tmp_path / "run")
    assert manifest.read(tmp_path / "run")["status"] == "completed"


def test_a_full_disk_is_the_cause_and_the_checkpoint_before_it_stays(llama_dir, tmp_path, monkeypatch):
    write = torch.save

    def save(thing, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            with Path("/dev/full").open("wb", buffering=0) as full:
                full.write(b"x")
        return write(thing, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RunStopped, match="disk full"):
        start(tmp_path, *long("sft"), f"model.name_or_path={llama_dir}")
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint-4").exists()
    record = manifest.read(tmp_path / "run")
    assert (record["status"], record["cause"][:9]) == ("failed", "disk full")
    assert checkpoints.find_fault(tmp_path / "run" / "checkpoints" / "checkpoint-2") is None


# ---- what may change ------------------------------------------------------------------------------------------------


@pytest.fixture
def ended(tmp_path):
    """A run directory that ended early, as its files tell."""
    from runner import compose
    from runner.__main__ import write_run

    composed = compose.compose(["trainer.max_steps=6", f"output_dir={tmp_path / 'run'}"])
    run_dir = compose.claim(composed.run_dir)
    write_run(run_dir, composed.config, composed.choices, [])
    manifest.update(run_dir, status="failed")
    return run_dir


@pytest.mark.parametrize(
    "typed",
    [
        {"trainer.logging_steps": 1},
        {"trainer.report_to": "tensorboard"},
        {"expect.eval_loss": [0, 1], "check_expected": True},
        {},
    ],
)
def test_what_cannot_change_the_result_may_change_and_is_recorded(ended, typed):
    assert resume.prepare(ended, typed, allow_changes=False)
    (event,) = manifest.read(ended)["resumes"]
    assert event["changed"].keys() == typed.keys()


@pytest.mark.parametrize("typed", [{"trainer.learning_rate": 1.0}, {"seed": 1}, {"trainer.max_steps": 9}])
def test_what_would_change_the_result_is_refused_unless_allowed(ended, typed):
    before = (ended / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=next(iter(typed))):
        resume.prepare(ended, typed, allow_changes=False)
    assert (ended / "config.yaml").read_bytes() == before
    assert resume.prepare(ended, typed, allow_changes=True)


def test_a_constant_schedule_may_go_on_for_longer_but_not_end_sooner(ended):
    resume.prepare(ended, {"trainer.lr_scheduler_type": "constant"}, allow_changes=True)
    manifest.update(ended, status="completed")
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        resume.prepare(ended, {"trainer.max_steps": 9}, allow_changes=False)
    (ended / "checkpoints" / "checkpoint-6").mkdir(parents=True)
    checkpoints.seal(ended / "checkpoints" / "checkpoint-6", {})
    assert not resume.prepare(ended, {}, allow_changes=False)
    assert resume.prepare(ended, {"trainer.max_steps": 9}, allow_changes=False)
    with pytest.raises(ConfigError, match="max_steps from 9 to 8"):
        resume.prepare(ended, {"trainer.max_steps": 8}, allow_changes=False)


@pytest.mark.parametrize(
    ("key", "value", "typed"),
    [("allow_code", ["mine.f"], r"allow_code=\[mine.f\]"), ("model.trust_remote_code", True, "trust_remote_code=true")],
)
def test_code_is_not_run_because_a_directory_says_so(ended, key, value, typed):
    config = OmegaConf.load(ended / "config.yaml")
    OmegaConf.update(config, key, value, force_add=True)
    OmegaConf.save(config, ended / "config.yaml")
    with pytest.raises(ConfigError, match=typed):
        resume.prepare(ended, {}, allow_changes=True)
    assert resume.prepare(ended, {key: value}, allow_changes=False)


def test_a_run_that_is_alive_on_another_machine_is_left_alone(ended):
    beat = datetime.now(UTC).isoformat()
    manifest.update(ended, status="running", heartbeat=beat, platform={"host": "elsewhere"})
    with pytest.raises(ConfigError, match="a process on elsewhere was alive"):
        resume.prepare(ended, {}, allow_changes=False)


def test_a_stranger_cannot_leave_code_in_a_config(ended):
    config = OmegaConf.load(ended / "config.yaml")
    OmegaConf.update(config, "trainer.lr_scheduler_kwargs", {"_target_": "os.system"}, force_add=True)
    OmegaConf.save(config, ended / "config.yaml")
    with pytest.raises(ConfigError, match="refused"):
        resume.prepare(ended, {}, allow_changes=True)


def test_a_misspelt_change_is_refused_as_everywhere(ended):
    with pytest.raises(ConfigError, match=r"did you mean trainer\.logging_steps"):
        resume.prepare(ended, {"trainer.loging_steps": 1}, allow_changes=False)


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("value_model.x", "value_model.x does not exist"),
        ("model.name_or_path.x", "name_or_path is 'embedded:smollm135m', and has no keys"),
    ],
)
def test_a_key_below_what_has_none_is_refused(ended, key, answer):
    with pytest.raises(ConfigError, match=re.escape(answer)):
        resume.prepare(ended, {key: 1}, allow_changes=False)


def test_a_run_that_still_runs_is_left_alone(ended):
    with manifest.recording(ended), pytest.raises(ConfigError, match="still runs it"):
        resume.prepare(ended, {}, allow_changes=False)


# ---- real processes, real signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143), (signal.SIGKILL, -9)],
)
def test_a_signal_ends_a_run_that_then_goes_on(number, code, llama_dir, tmp_path):
    words = [
        f"model.name_or_path={llama_dir}", *SMALL, *BATCH, "trainer.max_steps=60", "trainer.logging_steps=1",
        "trainer.save_strategy=steps", "trainer.save_steps=5", "output_dir=it", "trainer.lr_scheduler_type=constant",
    ]  # fmt: skip
    process = Command(*words, cwd=tmp_path)
    process.wait_for("step 12/")
    process.send_signal(number)
    said = process.end()
    assert process.returncode == code, said
    status = manifest.read(tmp_path / "it")["status"]
    assert status == ("running" if number == signal.SIGKILL else "preempted")
    last = max(line["step"] for line in logged(tmp_path / "it"))
    if number != signal.SIGKILL:  # the step in hand is saved
        assert checkpoints.find_fault(tmp_path / "it" / "checkpoints" / f"checkpoint-{last}") is None
        assert manifest.read(tmp_path / "it")["cause"] == f"stopped by {number.name}, at step {last}"
    run_dir = "it" if number != signal.SIGTERM else "auto"
    changed = ["trainer.max_steps=65", *(words if run_dir == "auto" else [])]
    again = Command(*[w for w in changed if w != "trainer.max_steps=60"], f"resume={run_dir}", cwd=tmp_path)
    said = again.end()
    assert again.returncode == 0, said
    assert "Going on from" in said
    steps = [line["step"] for line in logged(tmp_path / "it") if "loss" in line]
    assert steps == list(range(1, 66))
    assert manifest.read(tmp_path / "it")["status"] == "completed"
