"""Which rows share a batch: rows of one length, and several in one sequence, where they do not read each other."""

from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch.utils.data import Sampler

GROUPED = "group_by_length"
CHUNK_ROWS = 1_000
# Columns of one sequence each, after the prompt if that has a column of its own.
SEQUENCES = ("input_ids", "completion_ids", "chosen_ids", "rejected_ids", "chosen_input_ids", "rejected_input_ids")
LEAK = 1e-3  # of the largest score


def count_tokens(dataset: "Dataset", most: int | None = None) -> list[int]:
    """Return the tokens of the longest sequence of each row, which a batch is padded to.

    Args:
        dataset: rows as a trainer has them, text no more.
        most: where the trainer cuts.
    """
    import numpy as np
    import pyarrow.compute as pc

    found: list[int] = []
    columns = [name for name in ("prompt_ids", *SEQUENCES) if name in dataset.column_names]
    for table in dataset.select_columns(columns).with_format("arrow").iter(CHUNK_ROWS):
        length = {name: pc.list_value_length(table[name]).to_numpy() for name in columns}
        prompt = length.pop("prompt_ids", 0)
        found += (prompt + np.maximum.reduce(list(length.values()))).tolist()
    return [min(one, most) for one in found] if most else found


def by_length(dataset: "Dataset", arguments: Any, *, batch: int) -> "Sampler":
    """Return the order of rows under ``trainer.train_sampling_strategy=group_by_length``.

    It follows from the seed and the epoch alone: so ranks have the same, and a run that goes on has it again. That of
    transformers asks a generator that other draws have moved, and for lengths that TRL's rows do not have.
    """
    from transformers.trainer_pt_utils import DistributedLengthGroupedSampler

    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    lengths = count_tokens(dataset, getattr(arguments, "max_length", None))
    return DistributedLengthGroupedSampler(batch, lengths=lengths, num_replicas=1, rank=0, seed=seed)


def refuse_leaks(trainer: Any) -> None:
    """Refuse to put rows into one sequence where the model's attention lets them read each other.

    Two rows are joined as the trainer joins them, twice, with another first row: the scores of the second may not
    differ.

    Raises:
        ConfigError: They do.
    """
    import torch

    if not getattr(trainer, "padding_free", False) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return  # the model of the two cannot run before the training
    model, scores = trainer.model, []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    vocabulary = model.config.get_text_config().vocab_size
    training = model.training
    for first in (0, 1):
        rows = [[(first + 2 * token) % vocabulary for token in range(8)], list(range(2, 10))]
        batch = trainer.data_collator([{"input_ids": row, "labels": row} for row in rows])
        batch = {key: value.to(model.device) if hasattr(value, "to") else value for key, value in batch.items()}
        del batch["labels"]
        with torch.no_grad(), trainer.accelerator.autocast():
            scores.append(model.eval()(**batch).logits[0, 8:].float())
    model.train(training)
    if (scores[0] - scores[1]).abs().max() > LEAK * scores[0].abs().max():
        key = "packing" if trainer.args.packing else "padding_free"
        raise ConfigError(
            f"trainer.{key}=true cannot be done: several rows would share a sequence, and {type(base).__name__} with "
            f"{model.config._attn_implementation} attention lets them read each other. Type trainer.{key}=false "
            "trainer.train_sampling_strategy=group_by_length, or model.attn_implementation=flash_attention_2."
        )
