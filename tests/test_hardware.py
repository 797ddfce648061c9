import ctypes
from pathlib import Path

import psutil
import pytest
import torch

from runner import engines, hardware, trainers
from runner.hardware import (
    cores,
    describe,
    device_type,
    quantization_defaults,
    trainer_defaults,
    weights_dtype,
)


@pytest.fixture
def cpu_only(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)


@pytest.fixture
def cuda(monkeypatch):
    """A machine with a GPU; the test says whether it computes in bfloat16."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))

    def with_bf16(native):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)

    return with_bf16


def test_on_a_cpu_training_is_float32_and_nothing_is_recomputed_or_pinned(cpu_only):
    chosen = trainer_defaults({})
    assert chosen == {
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }


@pytest.mark.parametrize("listed", ["model name : A\nflags : fpu avx512f avx512_bf16_not\n", ""])
def test_a_cpu_that_emulates_bfloat16_is_not_said_to_have_it(cpu_only, monkeypatch, tmp_path, listed):
    (tmp_path / "cpuinfo").write_text(listed)
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    assert describe()["bf16"] is False


def test_a_gpu_with_bfloat16_uses_it_and_keeps_trls_checkpointing(cuda):
    cuda(True)
    assert trainer_defaults({}) == {"bf16": True, "fp16": False}


def test_an_older_gpu_uses_float16(cuda):
    cuda(False)
    assert trainer_defaults({}) == {"bf16": False, "fp16": True}


def test_bfloat16_on_a_cpu_is_there_for_who_types_it(cpu_only):
    assert not {"bf16", "fp16"} & set(trainer_defaults({"bf16": True}))


def test_what_a_person_typed_is_not_chosen(cuda):
    cuda(True)
    assert trainer_defaults({"bf16": False}) == {"fp16": False}
    assert trainer_defaults({"fp16": True}) == {}  # not bf16=True beside it, which would be refused
    assert trainer_defaults({"bf16": None}) == {"bf16": True, "fp16": False}


def test_a_gpu_that_is_not_used_does_not_set_the_precision(cuda):
    cuda(True)
    chosen = trainer_defaults({"use_cpu": True})
    assert (chosen["bf16"], chosen["fp16"]) == (False, False)
    assert chosen["gradient_checkpointing"] is False
    assert "use_cpu" not in chosen


def test_the_defaults_make_valid_training_arguments(tmp_path):
    from trl import SFTConfig

    args = SFTConfig(output_dir=str(tmp_path), report_to="none", **trainer_defaults({}))
    assert args.device.type == device_type()


def test_weights_that_train_are_float32_and_frozen_ones_follow_the_gpu(cuda):
    cuda(True)
    assert weights_dtype("auto", frozen=False, device="cuda") == "float32"
    assert weights_dtype("auto", frozen=True, device="cuda") == "bfloat16"
    assert weights_dtype("auto", frozen=True, device="cpu") == "float32"
    assert weights_dtype("float16", frozen=True, device="cuda") == "float16"
    cuda(False)
    assert weights_dtype("auto", frozen=True, device="cuda") == "float32"


def test_4_bit_weights_compute_in_what_the_device_does_well(cuda):
    cuda(True)
    assert quantization_defaults({}) == {"bnb_4bit_compute_dtype": "bfloat16"}
    assert quantization_defaults({"bnb_4bit_compute_dtype": None}) == {"bnb_4bit_compute_dtype": "bfloat16"}
    assert quantization_defaults({"bnb_4bit_compute_dtype": "float16"}) == {}
    assert quantization_defaults({}, use_cpu=True) == {"bnb_4bit_compute_dtype": "float32"}
    cuda(False)
    assert quantization_defaults({}) == {"bnb_4bit_compute_dtype": "float32"}


def test_the_machine_is_described():
    found = describe()
    assert found["device"] == device_type()
    assert found["cores"] == cores() >= 1
    assert found["cpu"]
    assert bool(found["accelerators"]) == (found["device"] != "cpu")


@pytest.mark.parametrize(("visible", "answer"), [("", "CUDA_VISIBLE_DEVICES='' hides them"), (None, "cannot use them")])
def test_gpus_that_stay_idle_are_told_of(visible, answer, cpu_only, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "GPUS", tmp_path)
    assert hardware.idle_gpus() is None
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "2 GPUs" in hardware.idle_gpus()
    assert answer in hardware.idle_gpus()


def test_a_driver_is_there_where_its_library_is(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": "a library"}.__getitem__)
    assert hardware.has_driver()

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert hardware.has_driver() is Path("/dev/kfd").exists()


def test_gpus_that_train_are_not_idle(cuda, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(hardware, "GPUS", tmp_path)
    assert hardware.idle_gpus() is None


@pytest.mark.parametrize("planned", [None, 2])
def test_a_process_trains_on_one_gpu_and_says_how_to_use_them_all(planned, cpu_only, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    node = {"_target_": "trl.SFTConfig", "use_cpu": False, "per_device_train_batch_size": 2}
    arguments, _ = trainers.build_arguments(node, tmp_path, evaluates=False, planned=planned)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 2)  # no DataParallel, which TRL refuses
    assert ("1 of 4 GPUs trains. Type launch=ddp" in caplog.text) is (planned is None)


def test_gradients_that_are_kept_on_the_cpu_get_a_group_of_processes_there(cuda, cpu_only, monkeypatch):
    node = {"fsdp": {"cpu_offload": True}}
    assert "ddp_backend" not in engines.fields(node)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    assert engines.fields(node)["ddp_backend"] == "cuda:nccl,cpu:gloo"
    assert "ddp_backend" not in engines.fields({"fsdp": {"cpu_offload": False}})


@pytest.mark.parametrize(("limit", "expected"), [("1073741824\n", 2**30), ("max\n", None), (f"{2**62}\n", None)])
def test_a_process_has_the_memory_of_its_container_or_of_the_machine(limit, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "CGROUP_LIMIT", tmp_path / "memory.max")
    (tmp_path / "memory.max").write_text(limit)
    assert hardware.memory_bytes("cpu") == (expected or psutil.virtual_memory().total)
