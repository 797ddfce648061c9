import json
import platform
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import numpy
import pytest

from runner import manifest
from runner.errors import ConfigError, RunStopped


def parsed(run_dir):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads((run_dir / "manifest.json").read_text(), parse_constant=refuse)


def test_a_new_run_says_what_was_typed_and_on_what_it_runs(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    manifest.create(tmp_path, argv=["python", "-m", "runner", "seed=0"], choices={"trainer": "sft"})
    found = parsed(tmp_path)
    assert found["status"] == "created"
    assert found["argv"] == ["python", "-m", "runner", "seed=0"]
    assert found["choices"] == {"trainer": "sft"}
    # printf 'seed: 0\n' | sha256sum
    assert found["config_sha256"] == "6a5a163cfb9d8459f178db8f04e1c14b22f30c274c8d68e806c982e03e48bbe3"
    assert found["versions"]["python"] == sys.version.split()[0]
    assert {"torch", "transformers", "trl"} <= set(found["versions"])


def test_a_running_process_says_that_it_is_alive_without_losing_what_is_written_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "BEAT_SECONDS", 0.001)
    manifest.create(tmp_path, argv=[])
    with manifest.recording(tmp_path):
        first = parsed(tmp_path)["heartbeat"]
        for number in range(200):
            manifest.update(tmp_path, **{f"field{number}": number})
    found = parsed(tmp_path)
    assert found["heartbeat"] > first
    assert all(found[f"field{number}"] == number for number in range(200))


def test_a_run_that_goes_on_elsewhere_says_where(tmp_path):
    manifest.create(tmp_path, argv=[])
    manifest.update(tmp_path, platform={"host": "elsewhere"})
    with manifest.recording(tmp_path):
        assert parsed(tmp_path)["platform"]["host"] == platform.node()


def test_a_killed_process_leaves_a_manifest_that_is_known_to_be_dead(tmp_path):
    manifest.create(tmp_path, argv=[])
    code = f"""if True:
        import os, signal
        from runner import manifest
        with manifest.recording({str(tmp_path)!r}):
            print("in", flush=True)
            input()
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    assert not manifest.is_dead(tmp_path, parsed(tmp_path))
    process.kill()
    process.wait()
    assert parsed(tmp_path)["status"] == "running"
    assert manifest.is_dead(tmp_path, parsed(tmp_path))


@pytest.mark.parametrize(("silent", "dead"), [(30, False), (600, True)])
def test_a_run_of_another_machine_is_dead_when_it_has_been_silent_for_long(silent, dead, tmp_path):
    beat = (datetime.now(UTC) - timedelta(seconds=silent)).isoformat()
    manifest.create(tmp_path, argv=[], heartbeat=beat)
    found = manifest.update(tmp_path, status="running", platform={"host": "elsewhere"})
    assert manifest.is_dead(tmp_path, found) is dead


def test_an_update_merges_and_keeps_the_rest(tmp_path):
    manifest.create(tmp_path, argv=[])
    manifest.update(tmp_path, data={"train": {"read": 4}})
    manifest.update(tmp_path, data={"train": {"kept": 3}, "eval": None}, seed=7)
    found = parsed(tmp_path)
    assert found["data"] == {"train": {"read": 4, "kept": 3}, "eval": None}
    assert found["seed"] == 7
    assert found["status"] == "created"


def test_any_number_becomes_valid_json(tmp_path):
    manifest.create(tmp_path, argv=[], metrics={"a": float("nan"), "b": numpy.float32("inf"), "c": numpy.int64(3)})
    assert parsed(tmp_path)["metrics"] == {"a": None, "b": None, "c": 3}


def test_an_update_that_cannot_be_written_leaves_the_old_manifest(tmp_path, monkeypatch):
    manifest.create(tmp_path, argv=[], seed=1)
    monkeypatch.setattr(manifest.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        manifest.update(tmp_path, seed=2)
    assert parsed(tmp_path)["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_who_reads_during_an_update_sees_a_whole_manifest(tmp_path):
    manifest.create(tmp_path, argv=[], seed=1)
    with (tmp_path / "manifest.json").open() as reader:
        manifest.update(tmp_path, seed=2)
        assert json.load(reader)["seed"] == 1
    assert parsed(tmp_path)["seed"] == 2


def test_a_run_that_ends_well_is_completed(tmp_path):
    manifest.create(tmp_path, argv=[])
    with manifest.recording(tmp_path):
        assert parsed(tmp_path)["status"] == "running"
    found = parsed(tmp_path)
    assert [event["status"] for event in found["timeline"]] == ["created", "running", "completed"]
    assert found["peak_memory"]["host"] > 10_000_000
    assert found["cause"] is None


@pytest.mark.parametrize(
    ("fault", "status", "cause"),
    [
        (RunStopped("loss is nan at step 3"), "failed", "loss is nan at step 3"),
        (ConfigError("no such file"), "failed", "no such file"),
        (KeyError("chosen"), "failed", "KeyError: 'chosen'"),
        (KeyboardInterrupt(), "preempted", "interrupted from the keyboard (SIGINT)"),
        (SystemExit(128 + signal.SIGTERM), "preempted", "stopped by SIGTERM"),
        (SystemExit(3), "failed", "the process left with exit code 3"),
    ],
)
def test_a_run_that_ends_badly_says_why_and_goes_on_failing(tmp_path, fault, status, cause):
    manifest.create(tmp_path, argv=[])
    with pytest.raises(type(fault)), manifest.recording(tmp_path):
        raise fault
    found = parsed(tmp_path)
    assert (found["status"], found["cause"]) == (status, cause)
    assert "test_manifest.py" in found["traceback"]
    assert found["timeline"][-1]["status"] == status


def test_a_manifest_that_cannot_be_written_does_not_hide_the_fault(tmp_path):
    manifest.create(tmp_path, argv=[])

    def lose_the_disk_and_stop():
        (tmp_path / "manifest.json").unlink()
        raise RunStopped("the reason")

    with pytest.raises(RunStopped, match="the reason"), manifest.recording(tmp_path):
        lose_the_disk_and_stop()


def test_no_secret_reaches_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "swordfish")
    monkeypatch.chdir(tmp_path)  # outside of a repository, whose differences are recorded
    manifest.create(tmp_path, argv=["trainer.hub_token=hunter2", "model.pad_token=<pad>"], note="swordfish")
    with pytest.raises(OSError, match="swordfish"), manifest.recording(tmp_path):
        raise OSError("https://me:hunter2@host said swordfish")
    text = (tmp_path / "manifest.json").read_text()
    assert "swordfish" not in text
    assert "hunter2" not in text
    assert "model.pad_token=<pad>" in text


def test_what_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"it has no manifest\.json"):
        manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        manifest.update(tmp_path, seed=1)


def git(folder, *words):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def test_the_commit_and_what_differs_from_it_are_recorded(tmp_path, monkeypatch):
    git(tmp_path, "init")
    (tmp_path / "a.txt").write_text("one\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (tmp_path / ".git" / "info" / "exclude").write_text("run\n")

    clean = manifest.create(run_dir, argv=[])["git"]
    assert len(clean["commit"]) == 40
    assert (clean["dirty"], clean["diff"]) == (False, "")

    (tmp_path / "a.txt").write_text("two\n")
    (tmp_path / "b.txt").write_text("new\n")
    (tmp_path / "c.txt").write_text("staged\n")
    git(tmp_path, "add", "c.txt")
    dirty = manifest.create(run_dir, argv=[])["git"]
    assert dirty["changed"] == [" M a.txt", "A  c.txt", "?? b.txt"]
    assert "-one\n+two\n" in dirty["diff"]
    assert "+staged\n" in dirty["diff"]
    assert dirty["diff_complete"]

    (tmp_path / "a.txt").write_text("x" * (manifest.DIFF_LIMIT + 10))
    cut = manifest.create(run_dir, argv=[])["git"]
    assert len(cut["diff"]) == manifest.DIFF_LIMIT
    assert not cut["diff_complete"]


def test_a_machine_without_git_runs_as_well(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert manifest.create(tmp_path, argv=[])["git"] is None


def test_the_manifest_needs_no_heavy_library():
    code = "import sys, runner.manifest; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
