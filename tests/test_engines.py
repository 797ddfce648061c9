"""What launch asks of the engines that split a model: known keys, known conflicts, and what is missing here."""

from importlib.metadata import requires
from importlib.util import find_spec

import pytest

from runner import compose, engines
from runner.errors import ConfigError
from runner.estimate import Shares, shares

SPLIT = {"fsdp2": {"fsdp": {"fsdp_version": 2}}, "zero3": {"deepspeed": {"zero_stage": 3}}}


def refusal(*words):
    with pytest.raises(ConfigError) as error:
        compose.compose(list(words))
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["launch=fsdp2", "launch.fsdp.reshard_after_foward=false"], "did you mean launch.fsdp.reshard_after_forward"),
        (["launch=zero2", "launch.deepspeed.zero_stge=1"], "did you mean launch.deepspeed.zero_stage"),
        (["launch=ddp", "launch.rendevous=a:1"], "did you mean launch.rendezvous"),
        (["launch=fsdp2", "launch.fsdp.cpu_offload=maybe"], "launch.fsdp.cpu_offload takes bool, found 'maybe'"),
        (["trainer.fsdp=true"], "Use launch=fsdp2"),
        (["trainer.deepspeed=a.json"], "Use launch=zero2"),
        (["launch=zero2", "launch.deepspeed.gradient_clipping=1.0"], "Use trainer.max_grad_norm"),
        (["launch=zero2", "launch.deepspeed.hf_ds_config=a.json"], "takes keys, not a file"),
        (["launch=fsdp2", "launch.fsdp.use_orig_params=true"], "has no place in FSDP2"),
        (["launch=fsdp2", "launch.fsdp.fsdp_version=1"], "fsdp_version must be 2"),
    ],
)
def test_a_key_of_an_engine_is_checked_like_every_other(words, answer):
    assert answer in refusal(*words)


@pytest.mark.parametrize("launch", ["fsdp2", "zero3"])
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["trainer=ppo"], "trainer=ppo cannot run with"),
        (["quantization=int8"], "load_in_8bit=true cannot be split"),
        (["quantization=nf4"], "type quantization.bnb_4bit_quant_storage=bfloat16"),
        (["quantization=nf4", "model.dtype=float16", "quantization.bnb_4bit_quant_storage=bfloat16"], "=float16"),
    ],
)
def test_what_cannot_be_split_is_refused(launch, words, answer):
    assert answer in refusal(f"launch={launch}", *words)


def test_what_fits_an_engine_composes():
    compose.compose(["launch=fsdp2", "quantization=nf4", "quantization.bnb_4bit_quant_storage=bfloat16"])
    compose.compose(["launch=zero2", "quantization=int8", "trainer.optim=paged_adamw_8bit"])
    compose.compose(["launch=fsdp2", "trainer.optim=adamw_torch_8bit"])  # torchao's
    assert "paged_adamw_8bit cannot update" in refusal("launch=fsdp2", "trainer.optim=paged_adamw_8bit")
    both = ["launch.fsdp.activation_checkpointing=true", "trainer.gradient_checkpointing=true"]
    assert "recompute the same activations" in refusal("launch=fsdp2", *both)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["launch.nodes=2"], "launch.nodes=2 must know where to meet"),
        (["launch.nodes=2", "launch.rendezvous=a"], "launch.rendezvous=a is not HOST:PORT"),
        (["launch.nodes=2", "launch.rendezvous=a:1", "launch.node_rank=2"], "numbered from 0"),
        (["launch.processes=2", "launch.nodes=3", "launch.rendezvous=a:1", "global_batch_size=32"], "by 6 processes"),
    ],
)
def test_machines_that_cannot_be_are_refused(words, answer):
    assert answer in refusal("launch=ddp", *words)


def test_what_this_machine_lacks_is_said_with_what_to_type():
    here = {"processes": 2, "use_cpu": True}
    assert engines.find_missing({"processes": 2}, **here) == []
    assert "Choose launch=ddp" in engines.find_missing(SPLIT["fsdp2"], **here)[0]
    lacking = engines.find_missing(SPLIT["zero3"], **here)[0]
    assert ("Choose launch=zero2" if find_spec("deepspeed") else "pip install 'runner[deepspeed]'") in lacking


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_missing_vllm_is_refused_with_the_versions_that_trl_names():
    (wanted,) = [text.partition(";")[0].strip() for text in requires("trl") if text.startswith("vllm")]
    assert f"pip install '{wanted}'" in engines.vllm_faults({"use_vllm": True})[0]
    assert engines.vllm_faults({"use_vllm": False}) == engines.vllm_faults({}) == []
    assert "trainer=grpo, trainer=rloo would have it" in refusal("trainer=ppo", "trainer.use_vllm=true")


def test_each_process_holds_its_part_of_what_is_split():
    eighth = 1 / 8
    assert shares({"processes": 8}, 8, accumulates=False) == Shares(1, 1, 1)
    assert shares(SPLIT["fsdp2"], 8, accumulates=False)[:3] == (eighth, eighth, eighth)
    assert shares(SPLIT["fsdp2"], 8, accumulates=True)[:3] == (eighth, 1, eighth)  # whole until the step's last pass
    assert shares({"deepspeed": {"zero_stage": 1}}, 8, accumulates=True)[:3] == (1, 1, eighth)
    assert shares({"deepspeed": {"zero_stage": 2}}, 8, accumulates=True)[:3] == (1, eighth, eighth)
    assert shares(SPLIT["zero3"], 8, accumulates=True)[:3] == (eighth, eighth, eighth)
    assert shares({"fsdp": {"fsdp_version": 2, "cpu_offload": True}}, 8, accumulates=False)[:3] == (0, 0, 0)
