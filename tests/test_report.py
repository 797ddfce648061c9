import base64
import json
import shlex
import subprocess
import sys

import pytest

from runner import manifest, report
from runner.errors import ConfigError, RunStopped

CONFIG = """
trainer: {_target_: trl.SFTConfig, learning_rate: 0.001}
model: {name_or_path: 'embedded:smollm135m'}
dataset: {generator: arithmetic}
peft: {_target_: peft.LoraConfig, r: 16}
"""
CHOICES = {"trainer": "sft", "model": "smollm135m", "dataset": "arithmetic", "peft": "lora"}


def sample(step, index, completion, score):
    prompt = [{"role": "user", "content": f"{index}+1"}]
    return {
        **{"step": step, "index": index, "prompt": prompt, "completion": completion, "reference": str(index + 1)},
        "scores": {"exact_match": score},
    }


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def run_dir(tmp_path):
    """A run of 20 steps, half of whose two held-out answers came right."""
    path = tmp_path / "run"
    (path / "model").mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG)
    manifest.create(path, argv=["python", "-m", "runner", "seed=1"], choices=CHOICES, overrides=["seed=1"])
    values = [3.0, 1.0, *[9.0] * 16, 0.25, 0.75]
    losses = [{"step": step, "loss": loss, "grad_norm": 1.0} for step, loss in enumerate(values, 1)]
    held_out = [{"step": 0, "eval_loss": 2.5}, {"step": 20, "eval_loss": 0.75}]
    write_lines(path / "metrics.jsonl", [held_out[0], *losses, held_out[1]])
    samples = [sample(0, 0, "<script>alert(1)</script>", 0.0), sample(0, 1, "no", 0.0)]
    samples += [sample(20, 0, "1", 1.0), sample(20, 1, "3", 0.0)]
    write_lines(path / "samples.jsonl", samples)
    with manifest.recording(path):
        manifest.update(
            path,
            data={"train": {"read": 10, "dropped": {"empty completion": 3}}},
            parameters=134_500_000,
            trainable_parameters=4_880_000,
        )
    return path


def test_the_summary_says_what_was_gained_where_it_is_and_what_to_type(run_dir, monkeypatch):
    monkeypatch.chdir(run_dir.parent)
    report.write_curves(run_dir)
    report.write_page(run_dir)
    lines = report.summary(run_dir).splitlines()
    assert lines[0] == "completed: sft of smollm135m on arithmetic with lora"
    assert lines[1].startswith("  steps   20 in 0 min ")
    # First and last tenth of 20 losses: (3 + 1) / 2 and (0.25 + 0.75) / 2.
    assert "  metrics loss 2 -> 0.5, eval_loss 2.5 -> 0.75" in lines
    assert "  exact_match 0 -> 0.5, 2 held-out prompts" in lines
    assert "  model   run/model" in lines
    assert "  report  run/report.html" in lines
    assert lines[-1] == "  next    python -m runner trainer=dpo model.name_or_path=run/model"


def test_what_comes_next_depends_on_the_trainer(run_dir):
    manifest.update(run_dir, choices={"trainer": "reward", "dataset": "hh"}, overrides=["trainer=reward", "seed=1"])
    command = f"trainer=grpo dataset=ultrafeedback reward=model reward.model.name_or_path={run_dir}/model"
    assert report.summary(run_dir).endswith(f"next    python -m runner {command}")
    manifest.update(run_dir, choices={"trainer": "grpo"}, overrides=["trainer=grpo", "seed=1", "trainer.beta=0.1"])
    assert report.summary(run_dir).endswith("next    python -m runner -m trainer=grpo trainer.beta=0.1 seed=1,2,3")
    for places in (["--config-dir=my options"], ["-cd", "my options"]):
        manifest.update(run_dir, argv=["python", "-m", "runner", *places, "trainer=grpo"])
        assert f"trainer.beta=0.1 {shlex.join(places)} seed=1,2,3" in report.summary(run_dir)


def test_a_run_that_ended_early_says_what_to_type_to_go_on_code_and_all(run_dir, monkeypatch):
    place = run_dir.rename(run_dir.with_name("a run"))
    (place / "config.yaml").write_text(f"{CONFIG}allow_code: [mine.f]\n")
    manifest.update(place, status="preempted")
    monkeypatch.chdir(place.parent)
    assert report.summary(place).endswith("next    python -m runner 'resume=a run' 'allow_code=[mine.f]'")


@pytest.mark.parametrize(
    ("statuses", "told"),
    [
        # a minute from status to status
        (["running", "preempted", "resumed", "running", "completed"], " in 2 min 0 s"),
        (["running", "completed"], " in 1 min 0 s"),
        (["running", "resumed", "running", "completed"], ""),  # it was killed, and nobody knows when
        (["running"], ""),
    ],
)
def test_the_time_of_a_run_is_that_in_which_it_ran(run_dir, statuses, told):
    times = [{"status": status, "time": f"2026-01-01T00:{at:02}:00+00:00"} for at, status in enumerate(statuses)]
    manifest.update(run_dir, status=statuses[-1], timeline=times)
    assert f"  steps   20{told}" in report.summary(run_dir).splitlines()


def test_the_summary_of_a_failed_run_gives_the_cause(tmp_path):
    manifest.create(tmp_path, argv=[], choices=CHOICES)
    with pytest.raises(RunStopped), manifest.recording(tmp_path):
        raise RunStopped("loss is nan at step 3")
    lines = report.summary(tmp_path).splitlines()
    assert lines[0].startswith("failed: sft of smollm135m")
    assert lines[1] == "  cause   loss is nan at step 3"
    assert not any(line.strip().startswith("next") for line in lines)


def test_the_page_shows_everything_and_needs_no_other_file(run_dir):
    report.write_curves(run_dir)
    report.write_page(run_dir)
    page = (run_dir / "report.html").read_text()
    image = base64.b64encode((run_dir / "curves.png").read_bytes()).decode()
    assert f"data:image/png;base64,{image}" in page
    shown = ["completed", "python -m runner seed=1", "0 -&gt; 0.5", "4.88M of 134M", "user: 0+1", "empty completion"]
    assert [text for text in shown if text not in page] == []
    assert 'src="http' not in page
    assert "<link" not in page


def test_what_a_model_wrote_cannot_act_on_the_page(run_dir):
    report.write_page(run_dir)
    page = (run_dir / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_page_of_a_failed_run_without_any_metrics_gives_cause_and_traceback(tmp_path):
    manifest.create(tmp_path, argv=[])
    with pytest.raises(KeyError), manifest.recording(tmp_path):
        raise KeyError("chosen")
    report.write_curves(tmp_path)
    report.write_page(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "KeyError: &#39;chosen&#39;" in page
    assert "Traceback" in page
    assert not (tmp_path / "curves.png").exists()


def test_before_and_after_are_the_first_and_the_last_evaluation_even_at_one_step(run_dir):
    lines = [sample(20, 0, "a", 0.0), sample(20, 1, "b", 0.0), sample(20, 0, "c", 1.0), sample(20, 1, "d", None)]
    write_lines(run_dir / "samples.jsonl", lines)
    run = report.load(run_dir)
    assert [[line["completion"] for line in lines] for lines in run.evaluations] == [["a", "b"], ["c", "d"]]
    assert run.scores == {"exact_match": (0.0, 1.0)}  # what has no score does not count


def test_half_a_line_of_a_killed_run_is_passed_over(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    assert report.load(run_dir).lines[-1] == {"step": 20, "eval_loss": 0.75}


def test_a_config_without_choices_still_names_what_was_run(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "trainer: {_target_: trl.experimental.orpo.ORPOConfig}\n"
        "model: {name_or_path: /home/someone/models/mine/}\ndataset: {path: org/rows}\n"
    )
    manifest.create(tmp_path, argv=[])
    assert report.load(tmp_path).names == {"trainer": "orpo", "model": "mine", "dataset": "rows", "peft": "none"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.123"),
        (1.0, "1"),
        (12345.6, "12,346"),
        (1e-5, "1e-05"),
        (4880000, "4,880,000"),
        (None, "-"),
        ("x", "x"),
    ],
)
def test_numbers_have_the_digits_that_count(value, text):
    assert report.number(value) == text


def test_the_command_writes_the_page_and_prints_the_summary(run_dir):
    done = subprocess.run([sys.executable, "-m", "runner.report", str(run_dir)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("completed: sft of smollm135m")
    assert (run_dir / "report.html").is_file()
    refused = subprocess.run([sys.executable, "-m", "runner.report", "/nowhere"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "/nowhere cannot be read as a run directory" in refused.stderr


def test_what_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a run directory"):
        report.summary(tmp_path)
