"""Trials that a launcher of Hydra's starts: on a Ray cluster, and as submitit's jobs, which may be queued again."""

import os
import signal
import sys
from importlib.util import find_spec

import psutil
import pytest
from commands import Command
from test_run import lines
from test_sweep import STEPPED, board, refusal, wait_until, words

from runner import manifest, remote, search
from runner.config import CONF

PRESETS = sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_launcher_is_read_or_says_what_to_install(name):
    installed = {"joblib": find_spec("joblib")}.get(name, True)
    if installed:
        assert search.read(["seed=1,2", f"hydra/launcher={name}"]).launcher == [f"hydra/launcher={name}"]
    else:
        assert "pip install 'runner[joblib]'" in refusal("seed=1,2", f"hydra/launcher={name}")


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["hydra/launcher=rai"], "hydra/launcher can be"),
        (["hydra.launcher.n_jobs=2"], "has no effect without hydra/launcher="),
        (["hydra/launcher=submitit_slurm", "hydra.launcher.partitoin=gpu"], "did you mean hydra.launcher.partition"),
        (["hydra/launcher=submitit_slurm", "search.gpus_per_trial=1"], "hydra.launcher.gpus_per_node=1"),
        (["hydra/launcher=submitit_slurm", "hydra.sweep.subdir=a"], "has no effect in a sweep"),
    ],
)
def test_a_launcher_that_cannot_be_is_refused_before_the_first_trial(overrides, answer):
    assert answer in refusal("seed=1,2", *overrides)


def test_what_this_machine_lacks_a_launcher_may_find_elsewhere():
    here = ["seed=1,2", "launch=fsdp2", "trainer.use_cpu=true"]
    assert "cannot run on a CPU" in refusal(*here)
    assert search.read([*here, "hydra/launcher=submitit_slurm"]).trials == 2


def test_a_cluster_is_opened_for_the_launcher_that_was_named_last(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)  # it cannot be imported
    remote.open_cluster(["hydra/launcher=ray", "hydra/launcher=submitit_local"])
    with pytest.raises(ImportError):
        remote.open_cluster(["hydra/launcher=submitit_local", "hydra/launcher=ray"])


def begin(folder, *overrides):
    return Command("-m", *overrides, f"hydra.sweep.dir={folder}", "search.retries=0")


@pytest.mark.slow
def test_two_workers_of_a_ray_cluster_prune_and_fail_as_trials_do_here(llama_dir, tmp_path):
    given = words(llama_dir, *STEPPED, "hydra/launcher=ray", "search.n_jobs=2", "trainer.learning_rate=3e-2,1e38,1e-6")
    given += ["trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0"]  # so that the second diverges at once
    sweep = begin(tmp_path, *given, "search.pruner=asha", "search.objective=eval_loss")
    said = sweep.end()
    assert sweep.returncode == 0, said
    assert "3 trials: 1 completed, 1 pruned, 1 diverged (failures: 1)" in said
    assert [board(tmp_path)[number]["status"] for number in range(3)] == ["completed", "diverged", "pruned"]
    assert len({manifest.read(tmp_path / str(number))["process"] for number in range(3)}) == 3


@pytest.mark.slow
def test_a_job_that_its_scheduler_preempts_is_queued_again_and_goes_on(llama_dir, tmp_path):
    given = words(llama_dir, "hydra/launcher=submitit_local", "trainer.learning_rate=1e-3,1e38", "samples.rows=0")
    given += ["search.n_jobs=2", "hydra.job.env_set.WANDB_PROJECT='a, b'"]
    sweep = begin(tmp_path, *given, "trainer.max_steps=200", "trainer.eval_on_start=false")
    metrics = tmp_path / "0" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(lines(metrics.parent)) > 3, 120)
    trial = psutil.Process(manifest.read(tmp_path / "0")["process"])
    assert trial.environ()["WANDB_PROJECT"] == "a, b"
    os.kill(trial.ppid(), signal.SIGUSR2)
    said = sweep.end()
    assert sweep.returncode == 0, said
    assert [board(tmp_path)[number]["status"] for number in range(2)] == ["completed", "diverged"]
    statuses = [entry["status"] for entry in manifest.read(tmp_path / "0")["timeline"]]
    assert statuses == ["created", "running", "preempted", "running", "completed"]
    steps = [line["step"] for line in lines(tmp_path / "0") if "loss" in line]
    assert steps == sorted(set(steps))
    assert steps[-1] == 200
