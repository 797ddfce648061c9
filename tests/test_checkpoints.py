import json

import pytest
import torch

from runner import checkpoints
from runner.errors import ConfigError, RunStopped


def go_back(run_dir):
    found = checkpoints.find_newest(run_dir)
    checkpoints.tidy(run_dir, found)
    return found


def save(run_dir, step, *, sealed=True, **options):
    """A checkpoint of two files, and a line of metrics for each step."""
    folder = run_dir / "checkpoints" / f"checkpoint-{step}"
    (folder / "value").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"w" * 100)
    (folder / "value" / "head.safetensors").write_bytes(b"v" * 10)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(f"{step}\n")
    if sealed:
        checkpoints.seal(folder, {"metrics.jsonl": (run_dir / "metrics.jsonl").stat().st_size}, **options)
    return folder


def truncate(folder):
    (folder / "model.safetensors").write_bytes(b"w" * 99)


def flip(folder):
    (folder / "model.safetensors").write_bytes(b"w" * 99 + b"x")


def lose(folder):
    (folder / "value" / "head.safetensors").unlink()


def garble(folder):
    (folder / checkpoints.SEAL).write_text('{"files": ')


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (truncate, "model.safetensors has 99 bytes instead of 100"),
        (flip, "model.safetensors is not what was written"),
        (lose, "value/head.safetensors is missing"),
        (garble, "complete.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, caplog, harm, fault):
    good, bad = save(tmp_path, 2), save(tmp_path, 10)
    harm(bad)
    assert checkpoints.find_fault(bad) == fault
    assert go_back(tmp_path) == good
    assert f"{bad} cannot be used: {fault}" in caplog.text
    assert (bad.parent / "checkpoint-10.damaged").is_dir()


def test_a_checkpoint_that_was_not_finished_is_not_used(tmp_path):
    good = save(tmp_path, 2)
    save(tmp_path, 4, sealed=False)
    assert go_back(tmp_path) == good


def test_the_logs_go_back_to_the_checkpoint(tmp_path):
    save(tmp_path, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("3\n")
    go_back(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "2\n"


def test_without_any_complete_checkpoint_a_run_begins_anew_with_empty_logs(tmp_path):
    save(tmp_path, 2, sealed=False)
    assert go_back(tmp_path) is None
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_new_run_has_nothing_to_go_back_to(tmp_path):
    assert go_back(tmp_path) is None


def test_when_all_complete_checkpoints_are_damaged_nothing_is_deleted(tmp_path):
    bad = save(tmp_path, 2)
    flip(bad)
    with pytest.raises(ConfigError, match="all its checkpoints are damaged"):
        go_back(tmp_path)
    assert bad.exists()


def test_checkpoints_of_the_model_alone_cannot_be_resumed_from(tmp_path):
    save(tmp_path, 2, resumable=False)
    with pytest.raises(ConfigError, match="save_only_model"):
        go_back(tmp_path)


@pytest.mark.parametrize(("keep", "left"), [(1, {2, 6}), (2, {2, 5, 6}), (None, {2, 3, 5, 6, 9})])
def test_the_oldest_are_deleted_but_never_the_best_nor_the_last_complete_one(tmp_path, keep, left):
    for step in (2, 3, 5, 6):
        save(tmp_path, step)
    save(tmp_path, 9, sealed=False)  # being written
    checkpoints.prune(tmp_path / "checkpoints", keep=keep, best="checkpoint-2")
    assert {int(p.name.rpartition("-")[2]) for p in (tmp_path / "checkpoints").iterdir()} == left | {9}


def test_a_seal_names_every_file(tmp_path):
    folder = save(tmp_path, 2)
    sealed = json.loads((folder / checkpoints.SEAL).read_text())
    assert sealed["files"].keys() == {"model.safetensors", "value/head.safetensors"}


def test_a_log_that_was_cut_is_not_filled_up(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is shorter than"):
        go_back(tmp_path)


def test_a_full_disk_is_recognised_behind_other_words_and_unfinished_checkpoints_make_room(tmp_path):
    good = save(tmp_path, 2)
    bad = save(tmp_path, 4, sealed=False)
    error = RuntimeError("unexpected pos 704 vs 598")
    assert not checkpoints.free_space(tmp_path, error)
    assert bad.exists()
    error.__cause__ = OSError(28, "No space left on device")
    assert checkpoints.free_space(tmp_path, error)
    assert good.exists()
    assert not bad.exists()


def test_a_device_that_is_full_is_the_cause_with_what_takes_less(tmp_path):
    with pytest.raises(RunStopped) as told, checkpoints.fitting(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1")
    assert str(told.value).startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. Type a smaller")
    with pytest.raises(RunStopped, match="out of memory: Unable to allocate"), checkpoints.fitting(tmp_path):
        raise MemoryError("Unable to allocate 9 GiB for an array")  # as numpy says it
    with pytest.raises(RuntimeError, match="shapes"), checkpoints.fitting(tmp_path):
        raise RuntimeError("shapes")
