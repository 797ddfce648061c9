"""Greedy answers to held-out prompts at every evaluation: samples.jsonl, and a mean of every score."""

import contextlib
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from runner import sampling

Row = dict[str, Any]

logger = logging.getLogger(__name__)


def held_out(rows: Iterable[Mapping[str, Any]], count: int) -> list[Row]:
    """Return the first ``count`` rows that hold a prompt, each with ``prompt`` and ``reference`` and its columns.

    The reference is a right answer as text: the completion, the chosen answer, the last assistant turn or the
    column ``answer``; None where the row has none. Rows of plain ``text`` hold no prompt: none of them is returned.
    """
    return list(islice(filter(None, (_split(dict(row)) for row in rows)), count))


class Answer(NamedTuple):
    """A greedy answer."""

    text: str
    ended: bool  # whether the model ended it, rather than the limit


class Samples(TrainerCallback):
    """Answer held-out prompts greedily at every evaluation, score the answers, and write both.

    Means go into the evaluation's metrics as ``eval_<score>``, so that they can choose the best checkpoint, and to
    ``log``. Nothing of the training changes: neither its random numbers nor the model's mode. Models that are
    sharded over processes are not sampled.

    Args:
        run_dir: Gets a line in samples.jsonl for every prompt and evaluation.
        rows: What ``held_out`` returns; columns beyond ``prompt`` and ``reference`` go to the scores.
        tokenizer: With a chat template, where prompts are messages.
        scores: Functions as reward functions are: ``function(completions=..., prompts=..., **columns)`` gives a finite
            number, or None, for each completion, as ``rewards.Scorer`` sees to.
        max_new_tokens: Most tokens of an answer.
        batch_size: Prompts that are answered at a time.
        log: Gets the means, for example ``trainer.log``.
    """

    def __init__(
        self,
        run_dir: str | Path,
        rows: Sequence[Row],
        tokenizer: Any,
        scores: Mapping[str, Callable[..., Sequence[float | None]]],
        *,
        max_new_tokens: int = 128,
        batch_size: int = 16,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self.path = Path(run_dir) / "samples.jsonl"
        self.rows, self.tokenizer, self.scores = list(rows), tokenizer, dict(scores)
        self.max_new_tokens, self.batch_size, self.log = max_new_tokens, batch_size, log
        self.told: set[str] = set()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Sample on the first rank and give the means to all."""
        if _is_sharded(model):
            self._tell("held-out prompts are not answered: the model is sharded over several processes")
            return
        means: dict[str, float] = {}
        if state.is_world_process_zero:
            half = torch.bfloat16 if args.bf16 else torch.float16
            with torch.autocast(model.device.type, dtype=half, enabled=bool(args.bf16 or args.fp16)):
                means = self.measure(
                    model,
                    step=state.global_step,
                    template=getattr(args, "chat_template_kwargs", None),
                    stop_token=getattr(args, "stop_token", None),
                )
        means = broadcast_object_list([means])[0]
        if metrics is not None:
            metrics.update(means)
        if self.log is not None and means:
            self.log(dict(means))

    def measure(
        self, model: Any, *, step: int, template: Mapping[str, Any] | None = None, stop_token: str | None = None
    ) -> dict[str, float]:
        """Answer all prompts, write samples.jsonl and return the mean of every score as ``eval_<score>``."""
        start = time.monotonic()
        prompts = [sampling.encode_prompt(self.tokenizer, row, template or {}) for row in self.rows]
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        fit = [i for i, ids in enumerate(prompts) if 0 < len(ids) <= context - self.max_new_tokens]
        if len(fit) < len(prompts):
            self._tell(
                f"{len(prompts) - len(fit)} of {len(prompts)} held-out prompts are not answered: they leave no room "
                f"for {self.max_new_tokens} new tokens in the model's context of {context}"
            )
        if not fit:
            return {}
        rows, ids = [self.rows[i] for i in fit], [prompts[i] for i in fit]
        sizes = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        with untouched_random_state():  # a score may draw, and so may a model's own code
            answers = generate(model, self.tokenizer, ids, stop_token=stop_token, **sizes)
            arguments = sampling.reward_arguments(rows, [answer.text for answer in answers], {})
            scored = {name: list(function(**arguments)) for name, function in self.scores.items()}
        self._write(step, rows, answers, scored)
        cut = sum(not answer.ended for answer in answers)
        note = f", {cut} answers cut at samples.max_new_tokens={self.max_new_tokens}" if cut else ""
        logger.info("answered %d held-out prompts in %.1f s%s", len(rows), time.monotonic() - start, note)
        known = {name: [value for value in values if value is not None] for name, values in scored.items()}
        return {f"eval_{name}": sum(values) / len(values) for name, values in known.items() if values}

    def _write(self, step: int, rows: list[Row], answers: list[Answer], scored: dict[str, list[float | None]]) -> None:
        lines = [
            {
                "step": step,
                "index": index,
                "prompt": row["prompt"],
                "completion": answer.text,
                "ended": answer.ended,
                "reference": row.get("reference"),
                "scores": {name: values[index] for name, values in scored.items()},
            }
            for index, (row, answer) in enumerate(zip(rows, answers, strict=True))
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))

    def _tell(self, message: str) -> None:
        if message not in self.told:
            self.told.add(message)
            logger.warning("%s", message)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_token: str | None = None,
) -> list[Answer]:
    """Return the greedy continuation of every prompt as text, without special tokens.

    Only the model decides: the settings of its generation config (temperature, penalties) do not take part. The
    model's mode stays as it was.
    """
    stops = sampling.stop_ids(model, tokenizer, stop_token)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    with _evaluating(model), torch.no_grad():
        answers = sampling.sample(model, [list(ids) for ids in prompts], None, stop_ids=stops, pad_id=pad, **sizes)
    return [
        Answer(tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True), ended)
        for tokens, ended in sampling.cut_at_stop(answers, stops)
    ]


@contextlib.contextmanager
def untouched_random_state() -> Iterator[None]:
    """Give the random generators of torch, numpy and Python back as they were."""
    python, arrays = random.getstate(), numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)


# ---- rows -------------------------------------------------------------------------------------------------


def _split(row: Row) -> Row | None:
    """Return a canonical row with its prompt and reference; None where it has no prompt."""
    if "chosen" in row and "rejected" in row:
        from trl import maybe_extract_prompt

        row |= maybe_extract_prompt(row)
    prompt, reference = row.get("prompt"), None
    if prompt:
        right = row.get("completion") if row.get("label", True) else None
        reference = _text(right or row.get("chosen") or row.get("answer"))
    elif messages := row.get("messages"):
        answered = messages[-1]["role"] == "assistant"
        prompt = messages[:-1] if answered else messages
        reference = _text(messages[-1:]) if answered else None
    return {**row, "prompt": prompt, "reference": reference} if prompt else None


def _text(answer: Any) -> str | None:
    if isinstance(answer, list):  # of messages, or of texts that are all right
        last = answer[-1] if answer else None
        return str(last.get("content") or "") if isinstance(last, dict) else last and " | ".join(map(str, answer))
    return None if answer is None else str(answer)


# ---- the model --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Switch dropout and gradient checkpointing (which would forbid the cache) off, then all modules back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _is_sharded(model: Any) -> bool:
    """Whether a process holds only a part of the weights, so that one process alone would wait for ever."""
    parts = any(hasattr(p, "ds_id") or hasattr(p, "to_local") for p in model.parameters())
    return parts or any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
