"""Rows of one length share a batch, and rows that share a sequence do not read each other."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from test_run import losses, start
from tiny import tiny_model, tiny_tokenizer
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from runner.batching import by_length, count_tokens
from runner.errors import ConfigError


def test_a_row_counts_as_its_longest_sequence():
    pairs = {"prompt_ids": [[1], [1, 2]], "chosen_ids": [[1, 2, 3], [1]], "rejected_ids": [[1], [1, 2, 3, 4]]}
    assert count_tokens(Dataset.from_dict(pairs)) == [4, 6]
    assert count_tokens(Dataset.from_dict(pairs), most=5) == [4, 5]  # the trainer cuts there
    texts = {"input_ids": [[1, 2], [1], []], "labels": [[1, 2], [1], []], "label": [True, False, True]}
    assert count_tokens(Dataset.from_dict(texts).select([2, 0])) == [0, 2]


def test_the_order_follows_from_seed_and_epoch_and_wastes_little():
    lengths = [7 * n % 97 + 1 for n in range(400)]
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
    arguments = SimpleNamespace(seed=1, data_seed=None, max_length=None)
    torch.manual_seed(0)
    order = by_length(rows, arguments, batch=8)
    first = list(order)
    torch.manual_seed(1)
    assert list(by_length(rows, arguments, batch=8)) == first
    assert sorted(first) == list(range(400))
    order.set_epoch(1)
    assert list(order) != first != list(by_length(rows, SimpleNamespace(seed=2, data_seed=None), batch=8))

    def padded(places):
        batches = [[lengths[place] for place in places[start : start + 8]] for start in range(0, 400, 8)]
        return sum(8 * max(batch) for batch in batches) / sum(lengths)

    assert padded(range(400)) > 1.6  # as they come, a batch is nearly always as long as the longest rows
    assert padded(first) < 1.1


def leaky(module, query, key, value, attention_mask, **options):
    return sdpa_attention_forward(module, query, key, value, None, **{**options, "is_causal": True})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama_dir", "neox_dir"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_learn_what_they_would_learn_alone(kind, attention, request, tmp_path):
    base = [f"model.name_or_path={request.getfixturevalue(kind)}", f"model.attn_implementation={attention}"]
    base += ["trainer.max_steps=1", "peft=none", "dataset.train_rows=4"]
    alone, _ = start(tmp_path, *base, name="alone")  # all rows in one batch
    packed, _ = start(tmp_path, *base, "trainer.packing=true", "trainer.max_length=256", name="packed")
    assert losses(packed) == pytest.approx(losses(alone), abs=1e-5)


@pytest.mark.slow
def test_packing_is_refused_where_rows_would_read_each_other(tmp_path):
    AttentionInterface.register("leaky", leaky)
    folder = tmp_path / "leaky"
    tiny_model("llama", tiny_tokenizer()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"trainer.packing=true cannot be done: .* LlamaForCausalLM with leaky"):
        start(tmp_path, f"model.name_or_path={folder}", "model.attn_implementation=leaky", "trainer.packing=true")
