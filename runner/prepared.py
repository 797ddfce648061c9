"""Token ids that are ready for TRL: its trainers take them as they are, instead of rendering and encoding again."""

import logging
from typing import TYPE_CHECKING, Any

from runner import reference, trainer_source
from runner.batching import GROUPED, SEQUENCES, by_length
from runner.encoding import IDS, PASSED_ON

if TYPE_CHECKING:
    from datasets import Dataset

    from runner.data import Splits

logger = logging.getLogger(__name__)

# Fields with which TRL would encode otherwise than ``encoding.encode`` does.
CHANGES = ("assistant_only_loss", "eos_token", "chat_template_path")


def choose_rows(splits: "Splits", arguments: Any, *, trainer: str) -> tuple["Dataset", "Dataset | None"]:
    """Return the rows to train and to evaluate on: their token ids where the trainer can take them, else the text.

    Args:
        splits: with ``ids``, see ``tokens.fit_splits``.
        arguments: the trainer's.
        trainer: its name.
    """
    columns = IDS.get(trainer, ())
    if not columns or not set(columns) <= set(splits.ids["train"].column_names):
        return splits.train, splits.eval
    why = [f"trainer.{key}" for key in CHANGES if getattr(arguments, key, None)]
    if why or not trainer_source.knows_trl():
        logger.info("TRL prepares the rows itself: %s", ", ".join(why) or "its version is not one that is known here")
        return splits.train, splits.eval
    if getattr(arguments, "dataset_num_proc", None):
        logger.warning("trainer.dataset_num_proc has no effect: rows are tokenized in one pass, in this process.")
    train, held_out = (_columns(ids, columns, arguments) for ids in (splits.ids["train"], splits.ids.get("eval")))
    return train, held_out


def _columns(ids: "Dataset | None", columns: tuple[str, ...], arguments: Any) -> Any:
    if ids is None:
        return None
    kept = [column for column in (*columns, *PASSED_ON) if column in ids.column_names]
    if "labels" in kept and arguments.completion_only_loss is False:
        kept.remove("labels")  # TRL then learns every token
    if "labels" in kept and not arguments.packing and arguments.max_length is not None:
        ids = _cut(ids, arguments.max_length, from_end=arguments.truncation_mode == "keep_end")
    return ids.select_columns(kept)


def _cut(ids: "Dataset", size: int, *, from_end: bool) -> "Dataset":
    """Cut what is longer than TRL would let it be; its other trainers cut when they make a batch."""
    if all(row["counts"][0]["total"] <= size for row in ids.select_columns("counts").to_list()):
        return ids
    part = slice(-size, None) if from_end else slice(size)

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        return {key: [row[part] for row in batch[key]] for key in ("input_ids", "labels")}

    return ids.map(cut, batched=True, keep_in_memory=True)


def prepared(cls: Any) -> Any:
    """Return a trainer's class that leaves token ids of ``choose_rows`` as they are, and prepares other rows as ever.

    What TRL 1.16 does beyond encoding stays: SFT packs and shuffles; KTO pairs each prompt of a batch with the
    completion before, for its KL estimate.
    Source: trl/trainer/{sft,dpo,kto,reward}_trainer.py, ``_prepare_dataset``
    """

    class Prepared(cls):
        def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any) -> Any:
            columns = set(dataset.column_names)
            if {"input_ids", "labels"} <= columns and not rest[0]:  # rest[0]: packing
                return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
            if {"prompt_ids", "completion_ids"} <= columns:
                _tell_balance(dataset["label"], args)
                return _with_neighbours(dataset, args) if self.calculate_KL else dataset
            if {"chosen_ids", "rejected_ids"} <= columns:
                return dataset
            return super()._prepare_dataset(dataset, processing_class, args, *rest)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            rows = self.train_dataset if train_dataset is None else train_dataset
            if not _is_grouped(rows, self.args):
                return super()._get_train_sampler(rows)
            return by_length(rows, self.args, batch=self.args.train_batch_size * self.args.gradient_accumulation_steps)

        def _get_eval_sampler(self, eval_dataset: Any) -> Any:
            if not _is_grouped(eval_dataset, self.args):
                return super()._get_eval_sampler(eval_dataset)
            return by_length(eval_dataset, self.args, batch=self.args.eval_batch_size)

        def _precompute_ref_logps(self, dataset: Any, *rest: Any) -> Any:
            compute = super()._precompute_ref_logps
            return reference.share(self, dataset, lambda: compute(dataset, *rest))

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Prepared, name, getattr(cls, name))
    return Prepared


def _is_grouped(dataset: Any, args: Any) -> bool:
    """Tell whether rows of one length are to share a batch; an online trainer's prompts have an order of their own."""
    return args.train_sampling_strategy == GROUPED and bool(set(SEQUENCES) & set(dataset.column_names))


def _with_neighbours(dataset: "Dataset", args: Any) -> "Dataset":
    """Give each row the completion of the row before it in its batch, the first that of the last."""

    def rotate(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"KL_completion_ids": [*batch["completion_ids"][-1:], *batch["completion_ids"][:-1]]}

    size = args.per_device_train_batch_size
    return dataset.map(rotate, batched=True, batch_size=size, keep_in_memory=True)


def _tell_balance(labels: Any, args: Any) -> None:
    """Say when the weights do not make up for the share of good rows.

    Source: KTO, arXiv:2402.01306, equation 8, with the bounds of TRL.
    """
    good = sum(labels)
    bad = len(labels) - good
    share = (args.desirable_weight * max(good, 1)) / (args.undesirable_weight * max(bad, 1))
    if not 0.995 <= share <= 1.335:
        logger.warning(
            "%d rows are good and %d bad: trainer.desirable_weight x good is %.2f of trainer.undesirable_weight x bad, "
            "and should be 1 to 1.33 of it.",
            good, bad, share,
        )  # fmt: skip
