"""Bytes and packing, by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from runner import compose
from runner.estimate import (
    CONTEXT,
    PROCESS,
    Model,
    Shares,
    Work,
    checkpoint_bytes,
    estimate_memory,
    nearest_fit,
    read_together,
    work_of,
)
from runner.tokens import pack

# 1,000 numbers, all trained, in float32: 4,000 bytes, as many of gradients, 8,000 of Adam
MODEL = Model(
    parameters=1000, trainable=1000, by_module={}, weights=4000, loading=0, kept=100, kept_checkpointed=10, cache=6,
    vocabulary=50, hidden=20, head=200, context=512,
)  # fmt: skip
WORK = Work(trainer="sft", sequences=4, length=10, scored=8)


def test_the_parts_of_a_step_are_those_of_a_pencil():
    # activations 4 x 10 x 100; logits 4 bytes x 8 tokens x 50 entries x 8
    parts = estimate_memory(MODEL, WORK)
    assert [parts[name] for name in ("weights", "gradients", "optimizer")] == [4000, 4000, 8000]
    assert [parts[name] for name in ("activations", "logits", "sampling")] == [4000, 12_800, 0]
    # the worst moment is the end of the forward pass, with the head's gradient: 4000 + 12800 + 4 x 200
    assert parts["peak"] == PROCESS + 4000 + 8000 + 17_600


def test_accumulated_gradients_are_held_beside_activations():
    peak = estimate_memory(MODEL, replace(WORK, accumulates=True))["peak"]
    assert peak == PROCESS + 4000 + 8000 + 4000 + 12_800 + 4000


def test_the_gradient_of_a_tied_embedding_is_added_to_that_of_the_output_layer():
    # beside 4,000 of gradients 800 that are yet to be added; a reward model has no logits
    work = replace(WORK, trainer="reward", length=1)
    assert estimate_memory(replace(MODEL, tied=200), work)["peak"] == PROCESS + 4000 + 8000 + 4000 + 800
    assert estimate_memory(MODEL, work)["peak"] == PROCESS + 4000 + 8000 + 4000


def test_what_is_lost_to_weights_made_whole_is_held_beside_activations():
    # 4,000 of weights, 8,000 of Adam, 4,000 of activations, 12,800 of logits, 800 of the head's gradient, 500 lost
    peak = estimate_memory(replace(MODEL, unpacked=500), WORK)["peak"]
    assert peak == PROCESS + 4000 + 8000 + 4000 + 12_800 + 800 + 500


def test_rows_that_begin_alike_hold_less():
    # 4 rows of 10 tokens of 100 bytes, read as one sequence: all begin with 4, and each adds 6
    model, work = replace(MODEL, per_token=600), replace(WORK, alike=(4, 4))
    assert estimate_memory(model, work)["activations"] == (4 + 4 * 6) * 100
    # those of a pair begin with 7: a pair adds 6 + 3
    assert estimate_memory(model, replace(work, alike=(4, 7)))["activations"] == (4 + 2 * (6 + 3)) * 100
    assert estimate_memory(MODEL, work)["activations"] == 4000  # the model reads rows as they come
    assert estimate_memory(model, replace(work, alike=(0, 0)))["activations"] == 4000


@pytest.mark.parametrize(
    ("common", "per_token", "padded", "together"),
    [
        ((0, 4, 4, 4), 600, False, (4, 28)),  # 28 tokens instead of 40
        ((0, 1, 1, 1), 600, False, (1, 10)),  # 37 of 40 do not pay
        ((0, 6, 0, 6), 20, True, (2, 14)),  # 2 x 14 x 34, and 28 x 48 as one: attention counts
        ((0, 5, 0, 5), 0, True, (1, 10)),  # 2 x 15 x 15 is more than 4 x 10 x 10
        ((0, 6, 0, 6), 0, True, (1, 10)),  # and 2 x 14 x 14 = 392 is more than 0.9 times as much
        ((0, 8, 0, 8), 0, True, (2, 12)),  # 288 of 400
        ((0, 8, 0, 8), 0, False, (1, 10)),  # of 200, where nothing is padded
    ],
)
def test_rows_are_read_together_where_that_costs_less(common, per_token, padded, together):
    assert read_together([10] * 4, common, size=10, per_token=per_token, padded=padded) == together


def test_padding_alone_can_be_worth_it():
    # rows of 10, 1, 1 and 1 tokens, padded to 40: 13 in one sequence
    assert read_together([10, 1, 1, 1], [0] * 4, size=10, per_token=600, padded=True) == (4, 13)


@pytest.mark.parametrize(
    ("truncated", "mode", "packing", "alike"),
    [
        (0, "keep_start", False, (3, 8)),  # two rows of 10, 12 in all
        (0.1, "keep_end", False, (0,)),  # rows that are cut by their beginnings have none in common
        (0, "keep_end", False, (3, 8)),
        (0, "keep_start", True, (0,)),
    ],
)
def test_what_rows_begin_with_is_counted_where_it_is_there(truncated, mode, packing, alike):
    arguments = SimpleNamespace(
        per_device_train_batch_size=2, gradient_accumulation_steps=1, optim="adamw_torch", use_cpu=True,
        gradient_checkpointing=False, truncation_mode=mode, packing=packing, max_length=10,
    )  # fmt: skip
    audit = {"longest": 10, "longest_pair": 12, "common": 3, "truncated": truncated}
    audit |= {"prompt_tokens": {"p99": 4}, "completion_tokens": {"p90": 6}}
    samples = {"rows": 0, "batch_size": 1, "max_new_tokens": 1}
    work = work_of("dpo", arguments, audit=audit, samples=samples, held_out=0, copies=0)
    assert work.alike == alike


def test_advice_counts_on_no_group_in_a_smaller_batch():
    # 13 tokens of 1,000 bytes are read of a group of 4; of 2 shuffled answers 20 may be, which take more than all 4 did
    model = replace(MODEL, per_token=600, kept_checkpointed=1000)
    work = replace(WORK, alike=(0, 9, 9, 9), checkpointing=True)
    advice = nearest_fit(model, work, PROCESS + 4000 + 8000 + 26_000, times=1)
    assert advice == "trainer.per_device_train_batch_size=1 trainer.gradient_accumulation_steps=4"


@pytest.mark.parametrize(
    ("batch", "steps", "alike"), [(8, 1, (3, 7, 7, 7)), (8, 2, (3, 7)), (2, 8, (3,)), (6, 1, (3, 7))]
)
def test_the_answers_of_a_group_begin_alike_where_they_share_a_batch(batch, steps, alike):
    # groups of 4: two in a batch, four in two batches that are shuffled, four in eight batches of two answers; and of
    # batches of six, of which another process has the rest of the groups, parts of three
    arguments = SimpleNamespace(
        per_device_train_batch_size=batch, gradient_accumulation_steps=steps, steps_per_generation=steps, use_cpu=True,
        num_generations=4, max_completion_length=5, gradient_checkpointing=False, optim="adamw_torch",
    )  # fmt: skip
    audit = {"longest": 7, "common": 3, "prompt_tokens": {"p99": 7}, "completion_tokens": {"p90": 0}}
    samples = {"batch_size": 1, "rows": 0, "max_new_tokens": 1}
    assert work_of("grpo", arguments, audit=audit, samples=samples, held_out=0, copies=0).alike == alike


@pytest.mark.parametrize(("trainer", "scored"), [("dpo", 4 * 3), ("cpo", 4 * 3), ("orpo", 2 * 3 + 2 * 10)])
def test_orpo_scores_the_chosen_prompts_too(trainer, scored):
    arguments = SimpleNamespace(
        per_device_train_batch_size=2, gradient_accumulation_steps=1, optim="adamw_torch", gradient_checkpointing=False,
        use_cpu=True,
    )  # fmt: skip
    audit = {"prompt_tokens": {"p99": 7}, "completion_tokens": {"p90": 3}, "longest": 10}
    samples = {"batch_size": 1, "rows": 0, "max_new_tokens": 1}
    assert work_of(trainer, arguments, audit=audit, samples=samples, held_out=0, copies=0).scored == scored


def test_loading_is_a_moment_of_its_own():
    # weights of 4,000 bytes and the file of 50,000 that they come from: more than the 29,600 of a step
    assert estimate_memory(replace(MODEL, loading=50_000), WORK)["peak"] == PROCESS + 4000 + 50_000
    assert estimate_memory(replace(MODEL, loading=100), WORK) == estimate_memory(MODEL, WORK)


def test_a_split_model_takes_its_part_and_what_is_gathered_to_compute():
    # of 4: 1000 of weights and twice the largest unit of 300, 1000 of gradients, 2000 of Adam; activations whole
    model, quarter = replace(MODEL, unit=300), Shares(0.25, 0.25, 0.25, gathers=True)
    parts = estimate_memory(model, replace(WORK, shares=quarter))
    assert [parts[name] for name in ("weights", "gradients", "optimizer")] == [1600, 1000, 2000]
    assert [parts[name] for name in ("activations", "logits")] == [4000, 12_800]
    assert parts["peak"] == PROCESS + 1600 + 2000 + 4000 + 12_800 + 4 * 200 // 4
    whole = estimate_memory(model, replace(WORK, shares=quarter._replace(resharded=False)))
    assert whole["weights"] == 1000 + 4000  # gathered until the backward pass has read them


def test_sampling_can_be_the_worst_moment():
    # 100 answers of 20 tokens with 6 bytes of cache each, and 4 copies of 50 logits in float32
    work = replace(WORK, sampled=100, sampled_length=20)
    assert estimate_memory(MODEL, work)["sampling"] == 100 * (20 * 6 + 4 * 4 * 50)


@pytest.mark.parametrize(("optimizer", "size"), [("adamw_torch", 12), ("adamw_bnb_8bit", 6), ("sgd", 4)])
def test_a_checkpoint_holds_what_trains_and_what_the_optimizer_keeps(optimizer, size):
    assert checkpoint_bytes(MODEL, optimizer) == 1000 * size


def test_the_nearest_change_that_fits_is_the_cheapest():
    model, work = replace(MODEL, kept=1e9, kept_checkpointed=1e8), replace(WORK, cuda=True)  # 40 GB, or 4
    assert nearest_fit(model, work, CONTEXT + 5e9, times=3) == "trainer.gradient_checkpointing=true"
    assert nearest_fit(model, work, CONTEXT, times=3) is None
    # 4 rows x 3 times are 2 x 6; a global batch size sees to that itself
    typed = nearest_fit(model, work, CONTEXT + 3e9, times=3).split()
    assert typed[1:] == ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=6"]
    assert compose.compose(typed)
    assert nearest_fit(model, work, CONTEXT + 3e9, times=None).split() == typed[:2]


def test_rows_are_packed_as_trl_packs_them():
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    lengths = [(n * 7) % 16 + 1 for n in range(1200)]
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    assert pack(lengths, 16) == len(pack_dataset(rows, 16, "bfd"))
    assert pack([4, 3, 2, 1], 5) == 2  # 4 and 1, 3 and 2
