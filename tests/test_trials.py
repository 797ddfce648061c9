"""Trials as processes: whatever one of them does, it is a row of the table, and the others go on."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest
import torch
from test_sweep import board, run, wait_until, words

from runner import compose, hardware, launch, manifest, trials
from runner.errors import ConfigError

FAULTS = """
import os, signal, time

def fine(completions, **kwargs):
    return [0.0 for _ in completions]

def raises(completions, **kwargs):
    raise ZeroDivisionError("one over " + os.environ.get("WANDB_PROJECT", "nothing"))

def dies(completions, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def leaves(completions, **kwargs):
    os._exit(7)

def hangs(completions, **kwargs):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    time.sleep(600)

def eats(completions, **kwargs):
    import resource, torch
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
    return [float(torch.ones(2**30).sum()) for _ in completions]
"""


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """A module of reward functions that do what no trial should."""
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(tmp_path)
    names = ["raises", "dies", "leaves", "hangs", "eats", "fine"]
    return ["allow_code=[" + ",".join(f"faults.{name}" for name in names) + "]"], names


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads its memory from /proc")  # noqa: PTH110
def test_whatever_a_trial_does_the_others_go_on(llama_dir, tmp_path, faults, monkeypatch, capsys):
    monkeypatch.setattr(trials, "GRACE", 0.5)
    allowed, names = faults
    given = words(llama_dir, *allowed, "reward.function=" + ",".join(f"faults.{name}" for name in names))
    code = run(tmp_path / "sweep", *given, "search.trial_timeout=18", "search.n_jobs=2", "search.retries=1")
    said = capsys.readouterr().out
    assert code == 0
    rows = board(tmp_path / "sweep")
    found = {name: rows[number]["status"] for number, name in enumerate(names)}
    assert found == {
        "raises": "failed", "dies": "killed", "leaves": "killed", "hangs": "timed out", "eats": "out of memory",
        "fine": "completed",
    }  # fmt: skip
    assert "6 trials: 1 completed, " in said
    assert "(failures: 5)" in said
    assert said.count("it is tried again") == 2
    assert "ZeroDivisionError: one over nothing" in rows[0]["cause"]
    assert rows[5]["rank"] == "1"
    assert manifest.read(tmp_path / "sweep" / "5")["status"] == "completed"


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_a_row_and_any_failure_may_be_an_error(llama_dir, tmp_path):
    given = words(llama_dir, "peft=none", "trainer.max_grad_norm=0", "trainer.learning_rate=1e20,1e-3")
    assert run(tmp_path / "sweep", *given, "search.fail=any") == 1
    assert [row["status"] for row in board(tmp_path / "sweep").values()] == ["completed", "diverged"]


@pytest.mark.slow
def test_a_sweep_whose_first_trials_fail_alike_ends(llama_dir, tmp_path, faults, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "another")  # and given back, as the sweep sets it for its trials
    given = words(llama_dir, *faults[0], "reward.function=faults.raises", "seed=1,2,3", "trainer.seed=1")
    given += ["hydra.job.env_set.WANDB_PROJECT=none"]
    assert run(tmp_path / "sweep", *given, "search.stop_after_failures=2") == 1
    assert len(board(tmp_path / "sweep")) == 2
    said = capsys.readouterr().out
    assert "the first 2 trials failed of the same cause" in said
    assert "ZeroDivisionError: one over none" in said


def ended(tmp_path, **fields):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    manifest.create(tmp_path)
    manifest.update(tmp_path, **fields)
    return tmp_path


@pytest.mark.parametrize(
    ("fields", "code", "stopped", "status"),
    [
        ({"status": "completed"}, 0, "", "completed"),
        ({"status": "completed"}, 0, "timeout", "completed"),
        ({"status": "pruned", "cause": "behind"}, 0, "", "pruned"),
        ({"status": "failed", "cause": "ValueError: x"}, 1, "", "failed"),
        ({"status": "failed", "cause": "OutOfMemoryError: CUDA out of memory. Tried"}, 1, "", "out of memory"),
        ({"status": "failed", "cause": "MemoryError: "}, 1, "", "out of memory"),
        ({"status": "failed", "cause": "loss is nan at step 3, which no step can mend."}, 1, "", "diverged"),
        ({"status": "failed", "cause": "the gradient of step 1 is not finite, in 4"}, 1, "", "diverged"),
        ({"status": "running"}, -signal.SIGKILL, "", "killed"),
        ({"status": "running"}, -signal.SIGSEGV, "", "killed"),
        ({"status": "running"}, -signal.SIGKILL, "timeout", "timed out"),
        ({"status": "running"}, 3, "", "killed"),
        ({"status": "preempted", "cause": "stopped by SIGTERM"}, 143, "preempted", "preempted"),
        ({"status": "preempted", "cause": "stopped by SIGTERM"}, 143, "timeout", "timed out"),
        ({"status": "created"}, -signal.SIGTERM, "preempted", "preempted"),
    ],
)
def test_how_a_trial_ended_follows_from_its_manifest_and_its_exit_code(fields, code, stopped, status, tmp_path):
    assert trials.judge(ended(tmp_path, **fields), code, stopped, 9.0)[0] == status


def test_a_trial_without_a_manifest_is_told_of_by_its_log(tmp_path):
    (tmp_path / "runner.log").write_text("Traceback\nImportError: no such thing\n\n")
    status, cause = trials.judge(tmp_path, 1, "", None)
    assert (status, cause) == ("failed", "it left with exit code 1, after: ImportError: no such thing")


def test_trials_share_out_the_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert trials.devices(2, 2) == [["2", "3"], ["5", "7"]]
    with pytest.raises(ConfigError, match="needs 6 devices, found 4"):
        trials.devices(3, 2)


def test_trials_side_by_side_take_turns_at_the_devices_that_are_to_be_seen(monkeypatch, tmp_path):
    for number in range(3):
        (tmp_path / str(number)).touch()
    monkeypatch.setattr(hardware, "GPUS", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert trials.devices(None, 1) is None
    assert trials.devices(None, 3) == [["4"], ["6"], ["4"]]
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert trials.devices(None, 2) is None
        with pytest.raises(ConfigError, match="needs 1 devices, found 0"):
            trials.devices(1, 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert trials.devices(None, 4) == [["0"], ["1"], ["2"], ["0"]]


@pytest.mark.parametrize(
    ("overrides", "one"),
    [([], True), (["launch=ddp"], False), (["trainer=ppo"], True),
     (["trainer=ppo", "reward=unique_chars", "trainer.reward_device='cuda:1'"], False)],
)  # fmt: skip
def test_a_trial_of_several_devices_sees_all(overrides, one):
    assert trials.takes_one_device(compose.compose(overrides, check=False).config) is one


def test_trials_share_out_the_cores(monkeypatch):
    with monkeypatch.context() as trial:
        trial.setattr(launch, "shared", [8])
        assert launch.threads(3) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.threads(2) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert launch.threads(3) == 2


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="reads an environment from /proc")  # noqa: PTH110
def test_a_server_that_was_killed_is_started_again_as_the_first_was(tmp_path):
    code = f"""
        import os, signal
        from multiprocessing import forkserver
        from pathlib import Path
        from runner import trials

        trials.warm(["json"], "bitsandbytes")
        first = forkserver._forkserver._forkserver_pid
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        trial = trials.Trial(0, 0, trials.Job({str(tmp_path)!r}, {{}}, {{}}, [], {{}}, 1))
        trial.start()  # waits for the server
        trial.kill()
        second = forkserver._forkserver._forkserver_pid
        told = Path(f"/proc/{{second}}/environ").read_text().split(chr(0))
        assert first != second
        assert {{"RUNNER_LEAVE_OUT=bitsandbytes", "OMP_NUM_THREADS=1", "PYTORCH_NVML_BASED_CUDA_CHECK=1"}} <= set(told)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_ends_a_sweep_does_not_end_the_server_of_its_trials(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import time; time.sleep(1)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    code = f"""
        import os, signal, time
        from multiprocessing import forkserver
        from pathlib import Path
        from runner import launch, trials

        for again in range(2):
            trials.warm(["slow"], "")
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
            server = forkserver._forkserver._forkserver_pid
            time.sleep(0.3)  # it imports
            for number in launch.SIGNALS:
                os.kill(server, number)
            trial = trials.Trial(0, 0, trials.Job({str(tmp_path)!r}, {{}}, {{}}, [], {{}}, 1))
            trial.start()
            trial.stop("preempted")  # before it has begun to work
            assert trial.ending()[0] == "preempted"
            assert trial.process.exitcode == -signal.SIGTERM
            assert server == forkserver._forkserver._forkserver_pid
            os.kill(server, signal.SIGKILL)  # for a second one
            os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a trial waits for its config at a FIFO")
def test_a_trial_that_begins_afresh_ends_with_its_sweep(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    (tmp_path / "manifest.json").write_text("{}")
    code = f"""
        import multiprocessing, os, sys, time, types
        from runner import hardware, trials

        def begin(job):
            hardware.has_driver = lambda: True
            sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(_is_in_bad_fork=lambda: True))
            trials._prepare_torch(job)

        job = trials.Job({str(tmp_path)!r}, {{}}, {{}}, [], {{}}, 1)
        process = multiprocessing.get_context("fork").Process(target=begin, args=(job,))
        process.start()
        print(process.pid, flush=True)
        process.join()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as leader:
        trial = psutil.Process(int(leader.stdout.readline()))
        wait_until(lambda: (tmp_path / "runner.log").exists())  # it works, as a command
        assert "--leader" in trial.cmdline()
        leader.kill()
    wait_until(lambda: not trial.is_running() or trial.status() == psutil.STATUS_ZOMBIE, 10)


def test_a_trial_begins_afresh_only_where_a_device_can_have_been_opened(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)  # as a build for GPUs once it was asked for them
    monkeypatch.setattr(hardware, "has_driver", lambda: False)
    monkeypatch.setattr(launch, "shared", [])
    monkeypatch.setattr(os, "execv", lambda *command: pytest.fail(f"begins afresh: {command}"))
    trials._prepare_torch(trials.Job("", {}, {}, [], {}, torch.get_num_threads()))
    assert launch.shared == [torch.get_num_threads()]


@pytest.mark.parametrize("status", ["created", "preempted", "running"])
def test_a_trial_that_waits_in_a_queue_ends_as_soon_as_it_is_told_to(status, tmp_path):
    job = trials.Job(str(ended(tmp_path, status=status)), {}, {}, [], {}, 1, ("hydra/launcher=submitit_slurm",))
    trial = trials.Trial(0, 0, job, process=trials._context().Process(target=time.sleep, args=(60,)))
    trial.process.start()
    trial.stopped, trial.told = "preempted", time.monotonic()
    trial.tend()
    waits = status != "running"
    trial.process.join(10 if waits else 0.2)
    assert (trial.process.exitcode is not None) is waits
    trial.process.kill()


@pytest.mark.slow
def test_a_trial_runs_as_a_command_too_with_its_devices_and_threads(llama_dir, tmp_path):
    from runner import compose

    composed = compose.compose(words(llama_dir))
    job = trials.Job(str(tmp_path), composed.config, composed.choices, [], {"CUDA_VISIBLE_DEVICES": "7"}, 1)
    command = [sys.executable, "-m", "runner.trials", json.dumps(vars(job))]
    assert subprocess.run(command, check=False).returncode == 0
    assert manifest.read(tmp_path)["status"] == "completed"
