import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_run import BATCH, QUICK, SMALL, extras, start

from runner import compose, manifest, replay
from runner.__main__ import write_run
from runner.config import option_names
from runner.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("trainer", option_names("trainer"))
def test_a_replay_in_another_place_with_other_workers_is_identical(trainer, llama_dir, tmp_path):
    run_dir, _ = start(
        tmp_path, f"trainer={trainer}", f"model.name_or_path={llama_dir}", "trainer.learning_rate=1e-2",
        "peft.lora_dropout=0.1", *extras(trainer),
    )  # fmt: skip
    workers = {"trainer.dataloader_num_workers": 1}
    assert replay.replay(run_dir, tmp_path / "elsewhere" / "again", **workers) is None
    again = manifest.read(tmp_path / "elsewhere" / "again")
    assert again["result_sha256"] == manifest.read(run_dir)["result_sha256"] is not None


def test_a_sweep_gives_each_job_a_directory_whose_replay_is_identical(llama_dir, tmp_path):
    words = [f"model.name_or_path={llama_dir}", *SMALL, *QUICK, *BATCH, "trainer=sft,dpo"]
    done = subprocess.run([sys.executable, "-m", "runner", "-m", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [path.parent for path in sorted(tmp_path.glob("outputs/sweeps/*/*/*/manifest.json"))]
    assert [path.name for path in found] == ["0", "1"]
    seen = [(record["choices"]["trainer"], record["status"]) for record in map(manifest.read, found)]
    assert seen == [("sft", "completed"), ("dpo", "completed")]
    assert replay.replay(found[1], **{"trainer.dataset_num_proc": 2}) is None


def test_a_replay_changes_nothing_that_could_change_the_result(llama_dir, tmp_path):
    run_dir, _ = start(tmp_path, f"model.name_or_path={llama_dir}")
    with pytest.raises(ConfigError, match=r"cannot change trainer.seed"):
        replay.replay(run_dir, **{"trainer.seed": 7})


def test_a_replay_of_what_is_wrong_is_refused_before_there_is_a_directory(tmp_path):
    composed = compose.compose([f"output_dir={tmp_path / 'run'}"])
    write_run(run_dir := compose.claim(composed.run_dir), composed.config, composed.choices, [])
    manifest.update(run_dir, status="completed")
    with pytest.raises(ConfigError, match="dataloader_num_workers takes int, found 'two'"):
        replay.replay(run_dir, **{"trainer.dataloader_num_workers": "two"})
    assert list(tmp_path.iterdir()) == [run_dir]


def test_a_replay_names_the_first_step_where_it_parts_and_by_how_much(llama_dir, tmp_path):
    run_dir, _ = start(tmp_path, f"model.name_or_path={llama_dir}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    second = next(line for line in lines if line["step"] == 2 and "loss" in line)
    second["loss"] += 0.5
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = replay.replay(run_dir)
    assert found.startswith("They part at step 2: loss was")
    assert found.endswith("by 0.5")


def test_weights_are_compared_too_and_the_run_may_be_the_directory_one_is_in(llama_dir, tmp_path, monkeypatch):
    run_dir, _ = start(tmp_path, f"model.name_or_path={llama_dir}")
    manifest.update(run_dir, result_sha256="0" * 64)
    monkeypatch.chdir(run_dir)
    assert replay.replay(Path()) == "All metrics are the same, and the final weights are not"
    assert (tmp_path / "run_replay" / "model").is_dir()


def test_what_is_not_as_it_was_is_named(llama_dir, tmp_path, caplog):
    run_dir, _ = start(tmp_path, f"model.name_or_path={llama_dir}")
    manifest.update(run_dir, versions={"trl": "1.15.0"}, data={"train": {"fingerprint": "x"}})
    assert replay.replay(run_dir) is None
    assert "versions.trl was 1.15.0 and is" in caplog.text
    assert "data.train.fingerprint was x and is" in caplog.text


def test_only_a_completed_run_that_needs_no_code_can_be_replayed(llama_dir, tmp_path):
    run_dir, _ = start(tmp_path, f"model.name_or_path={llama_dir}")
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("allow_code: []", "allow_code: [os.system]"))
    with pytest.raises(ConfigError, match="allow_code runs code"):
        replay.replay(run_dir)
    manifest.update(run_dir, status="failed")
    with pytest.raises(ConfigError, match="its status is failed"):
        replay.replay(run_dir)
