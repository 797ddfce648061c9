"""Several real processes for one run, over gloo."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import test_resume
import torch
from safetensors.torch import load_file
from test_resume import logged, wait_for
from test_run import SMALL, extras, losses, start

from runner import checkpoints, compose, launch, manifest
from runner.errors import ConfigError, RunStopped

pytestmark = pytest.mark.slow
TWO = ["launch=ddp", "launch.processes=2"]
STEPS = ["trainer.max_steps=4", "trainer.warmup_steps=0", "trainer.logging_steps=1",
         "trainer.per_device_train_batch_size=2", "trainer.per_device_eval_batch_size=4",
         "trainer.learning_rate=1e-2"]  # fmt: skip


def begin(tmp_path, *overrides, name="run"):
    """Make a run directory as ``python -m runner`` does."""
    from runner.__main__ import write_run

    composed = compose.compose([*SMALL, *STEPS, *overrides, f"output_dir={tmp_path / name}"])
    run_dir = compose.claim(composed.run_dir)
    write_run(run_dir, composed.config, composed.choices, list(overrides))
    return run_dir, composed.config["launch"]


def spawn(tmp_path, *words):
    return test_resume.spawn(tmp_path, *SMALL, *STEPS, *words, f"output_dir={tmp_path / 'run'}")


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo", "reward", "ppo"])
def test_two_processes_train_as_one_does_on_the_same_global_batch(trainer, llama_dir, tmp_path):
    options = [f"trainer={trainer}", f"model.name_or_path={llama_dir}", "global_batch_size=4", *extras(trainer)]
    options += ["trainer.generation_kwargs={do_sample: false}"] if trainer == "grpo" else []
    one, _ = start(tmp_path, *STEPS, *options, "trainer.per_device_train_batch_size=4", name="one")
    two, node = begin(tmp_path, *options, *TWO, name="two")
    metrics = launch.launch(two, node)
    assert manifest.read(two)["metrics"] == metrics
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert len(losses(two)) == 4
    a, b = (load_file(run_dir / "model" / "adapter_model.safetensors") for run_dir in (one, two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-3, rtol=0)


def test_the_global_batch_is_made_of_what_there_is(llama_dir, tmp_path):
    run_dir, _ = start(tmp_path, f"model.name_or_path={llama_dir}", "global_batch_size=8")
    assert manifest.read(run_dir)["chosen"]["gradient_accumulation_steps"] == 2
    with pytest.raises(ConfigError, match="global_batch_size=6 cannot be made by 2 processes"):
        compose.compose(["global_batch_size=6", "trainer.per_device_train_batch_size=2", *TWO])


def test_a_rank_that_raises_ends_all_and_is_named(llama_dir, tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text(
        "import os\n"
        "calls = []\n"
        "def fails(completions, **kwargs):\n"
        "    calls.append(len(completions))\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 2: raise ValueError('too bad')\n"
        "    return [float(len(str(c)) % 7) for c in completions]\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(tmp_path)
    options = ["reward.function=rewards_of_mine.fails", "allow_code=[rewards_of_mine.fails]", *extras("grpo")[1:]]
    run_dir, node = begin(tmp_path, "trainer=grpo", f"model.name_or_path={llama_dir}", *TWO, *options)
    with pytest.raises(RunStopped, match=r"rank 1: .*too bad"):
        launch.launch(run_dir, node)
    record = manifest.read(run_dir)
    assert record["status"] == "failed"
    assert "too bad" in record["traceback"]


def test_a_rank_that_is_killed_ends_all_within_seconds_and_the_run_goes_on_where_it_was(llama_dir, tmp_path):
    options = [f"model.name_or_path={llama_dir}", *TWO, "trainer.max_steps=40"]
    options += ["trainer.save_strategy=steps", "trainer.save_steps=5"]
    whole, node = begin(tmp_path, *options, name="whole")
    launch.launch(whole, node)
    process = spawn(tmp_path, *options)
    wait_for(process, "step 12/")
    run_dir = tmp_path / "run"
    os.kill(int((run_dir / "ranks" / "1.pid").read_text()), signal.SIGKILL)
    start = time.monotonic()
    process.communicate()
    assert time.monotonic() - start < 30
    assert process.returncode == 1
    assert manifest.read(run_dir)["cause"] == "rank 1 was killed by SIGKILL"
    from runner import resume

    assert resume.prepare(run_dir, {}, allow_changes=False)
    launch.launch(run_dir, node)
    assert logged(run_dir) == logged(whole)
    assert manifest.read(run_dir)["result_sha256"] == manifest.read(whole)["result_sha256"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_parent_lets_all_ranks_end_at_one_step_with_one_checkpoint(number, code, llama_dir, tmp_path):
    process = spawn(tmp_path, f"model.name_or_path={llama_dir}", *TWO, "trainer.max_steps=300")  # fmt: skip
    wait_for(process, "step 12/")
    process.send_signal(number)
    said = process.communicate()[0]
    assert process.returncode == code, said
    record = manifest.read(tmp_path / "run")
    last = max(line["step"] for line in logged(tmp_path / "run"))
    assert record["status"] == "preempted"
    assert record["cause"] == f"stopped by {number.name}, at step {last}"
    folder = tmp_path / "run" / "checkpoints" / f"checkpoint-{last}"
    assert checkpoints.find_fault(folder) is None
    assert (folder / "runner_state_1.pt").exists()


def test_a_rank_that_does_not_begin_in_time_ends_the_run(llama_dir, tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text(
        "import os, time\n"
        "if os.environ.get('RANK') == '1': time.sleep(1000)\n"
        "def score(completions, **kwargs): return []\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(tmp_path)
    options = ["reward.function=late.score", "allow_code=[late.score]", *extras("grpo")[1:], "launch.start_timeout=5"]
    run_dir, node = begin(tmp_path, "trainer=grpo", f"model.name_or_path={llama_dir}", *TWO, *options)
    with pytest.raises(RunStopped, match="2 of 2 ranks did not begin to train in 5 s"):
        launch.launch(run_dir, node)


def test_ranks_that_somebody_else_starts_share_one_directory(llama_dir, tmp_path):
    words = [*SMALL, *STEPS, f"model.name_or_path={llama_dir}"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "runner",
        *words,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "outputs").glob("*/*/manifest.json")
    assert json.loads(found.read_text())["status"] == "completed"
    assert len(losses(found.parent)) == 4
