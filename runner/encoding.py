"""Rows to token ids as TRL prepares them: in one batched pass, kept on disk for whoever reads the same rows again."""

import hashlib
import inspect
import itertools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import rendering
from runner.rows import Row

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHUNK_ROWS = 1_000  # tokens of so many rows are held at once
COMPARED = 16  # texts at both ends of a chunk that are encoded both ways
KEPT_DAYS = 30  # since a file was last read
PASSED_ON = ("label", "margin")  # columns that a trainer reads beside token ids

# What each trainer is given instead of text; the others prepare their rows themselves, and here are only counted.
IDS = {
    "sft": ("input_ids", "labels"),
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "kto": ("prompt_ids", "completion_ids"),
    "reward": ("chosen_ids", "rejected_ids"),
}


@dataclass(frozen=True)
class Counts:
    """Tokens of one sequence: an answer after its prompt, a text or a chat as a whole, or a prompt alone.

    Attributes:
        prompt: tokens before the answer, which are not learnt.
        total: all tokens.
        stops: the last token, whitespace aside, is one that ends a turn or the text.
        bos: beginning-of-sequence tokens at the start; 2 when both template and tokenizer put one.
        differs: alone, the prompt is rendered otherwise than before the answer.
    """

    prompt: int
    total: int
    stops: bool
    bos: int
    differs: bool


@dataclass(frozen=True)
class Spelt:
    """One sequence as the model reads it: token ids, those before the answer, and the texts that they spell."""

    ids: list[int]
    prompt: int
    text: str
    prompt_text: str  # as it is served: with the generation prompt, alone


def encode(
    dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", *, reads: str, trainer: str = "", tools: bool = True,
    name: str = "train",
) -> "Dataset":  # fmt: skip
    """Return the token ids and the counts of every row, from the disk if they were made before.

    The file is named after what its content follows from: the rows, the tokenizer with its chat template, what is
    asked for, and how it is made here. Processes that want the same one at once make it once. It lies in the folder of
    ``datasets`` (``HF_DATASETS_CACHE``), and is removed when nobody has read it for a month.

    Args:
        dataset: rows of ``data.load_splits``.
        tokenizer: with the chat template and special tokens of the training.
        reads: what the trainer reads, see ``views.view``; of ``prompt`` only the prompt.
        trainer: its name; the columns of ids are those of ``IDS``, the labels of ``sft`` those of the answer.
        tools: whether the trainer tells the template a row's tools and variables.
        name: of the split, for messages.

    Returns:
        A row for each row: ``counts``, of its one sequence or of both sides, the ids, and ``PASSED_ON``.

    Raises:
        ConfigError: there is no chat template, or it refuses a row.
    """
    import pyarrow as pa
    from datasets import config

    columns = IDS.get(trainer, ()) if trainer in ("sft", "reward") or "prompt" in dataset.column_names else ()
    features = _features(dataset, columns)

    def chunk(batch: dict[str, list[Any]], numbers: list[int]) -> pa.Table:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        made = encode_rows(rows, tokenizer, reads=reads, columns=columns, tools=tools, first_row=numbers[0] + 1)
        both = [{**row, **one} for row, one in zip(rows, made, strict=True)]
        return pa.Table.from_pylist(both, schema=features.arrow_schema)

    def make(**where: Any) -> "Dataset":
        started = time.process_time()
        encoded = dataset.map(
            chunk, batched=True, batch_size=CHUNK_ROWS, with_indices=True, desc=f"Tokenizing {name} rows",
            features=features, remove_columns=[one for one in dataset.column_names if one not in features], **where,
        )  # fmt: skip
        logger.info("%s: %d rows tokenized in %.1f CPU s", name, len(dataset), time.process_time() - started)
        return encoded

    digest = _digest(dataset, tokenizer, (reads, columns, tools))
    file = Path(config.HF_DATASETS_CACHE, "runner", f"{digest}.arrow")
    where = {"cache_file_name": str(file), "new_fingerprint": digest, "load_from_cache_file": False}
    try:
        return _once(file, lambda: make(**where), name)
    except OSError as error:
        logger.warning("Token ids are not kept: %s. Point HF_DATASETS_CACHE at a folder with room for them.", error)
        return make(keep_in_memory=True, new_fingerprint=digest)


def _features(dataset: "Dataset", columns: Sequence[str]) -> Any:
    from datasets import Features, List, Value

    kinds = {"prompt": "int32", "total": "int32", "stops": "bool", "bos": "int32", "differs": "bool"}
    passed_on = {column: dataset.features[column] for column in PASSED_ON if column in dataset.column_names}
    counts = List({key: Value(kind) for key, kind in kinds.items()})
    return Features({"counts": counts, **{column: List(Value("int32")) for column in columns}, **passed_on})


def _once(file: Path, make: Callable[[], "Dataset"], name: str) -> "Dataset":
    """Read a file, or make it while nobody else does."""
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        _forget(file.parent)
        found = _read(file)
        if found is None:
            return make()
        logger.info("%s: %d rows were tokenized before", name, len(found))
        return found


def _read(file: Path) -> "Dataset | None":
    """Return what was kept in a file; a damaged one is removed."""
    import pyarrow as pa
    from datasets import Dataset

    if not file.exists():
        return None
    try:
        found = Dataset.from_file(str(file))
    except (pa.ArrowInvalid, OSError) as error:
        logger.warning("%s is damaged, and made again: %s", file, error)
        file.unlink()
        return None
    os.utime(file)
    return found


def _forget(folder: Path) -> None:
    """Remove what nobody has read for a month."""
    for file in folder.glob("*.arrow*"):
        if time.time() - file.stat().st_mtime > KEPT_DAYS * 24 * 3600:
            file.unlink(missing_ok=True)


def digest_rows(dataset: "Dataset") -> Any:
    """Return a SHA-256 of the rows and of how they are encoded, which more can be added to."""
    import pyarrow as pa

    found = hashlib.sha256("".join(map(inspect.getsource, (sys.modules[__name__], rendering))).encode())
    with pa.ipc.new_stream(_Sink(found), dataset.features.arrow_schema) as stream:
        for table in dataset.with_format("arrow").iter(CHUNK_ROWS):
            stream.write_table(table.cast(dataset.features.arrow_schema))
    return found


def _digest(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", asked: Any) -> str:
    found = digest_rows(dataset)
    about: dict[str, Any] = {"class": type(tokenizer).__name__, "template": tokenizer.chat_template, "asked": asked}
    about["special"] = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    if tokenizer.is_fast:
        tokenizer("")  # switches padding and cutting off, which are part of what follows
        found.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        about["spec"] = {key: repr(value) for key, value in tokenizer.init_kwargs.items()} | tokenizer.get_vocab()
    found.update(json.dumps(about, sort_keys=True).encode())
    return found.hexdigest()[:32]


class _Sink:
    """A file that only digests what is written to it."""

    closed = False

    def __init__(self, digest: Any) -> None:
        self.write = digest.update

    def writable(self) -> bool:
        return True

    def flush(self) -> None: ...

    def close(self) -> None: ...


def encode_rows(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    reads: str,
    columns: Sequence[str] = (),
    tools: bool = True,
    first_row: int = 1,
) -> list[dict[str, Any]]:
    """Return counts and columns of ids of rows, see ``encode``.

    Text gets the special tokens of the tokenizer, and a stop token at its end; a chat only what its template gives,
    where a row's ``tools`` are told to the template. Both are what TRL does; its online trainers ignore ``tools``.

    Args:
        rows: all text or all messages.
        tokenizer: with chat template if rows are messages.
        reads: what the trainer reads.
        columns: of ``IDS``.
        tools: whether the trainer tells the template a row's tools and variables.
        first_row: number of the first row, for messages.
    """
    spelt = spell_rows(rows, tokenizer, reads=reads, tools=tools, first_row=first_row)
    stops = rendering.stop_tokens(tokenizer, of_chat=rendering.is_chat(rows[0], reads)) if rows else set()
    bos, blank = tokenizer.bos_token_id, cache(lambda token: not str(tokenizer.decode([token])).strip())
    made = []
    for row in spelt:
        shared = min((one.prompt for one in row), default=0)  # of two answers, what both go on from
        counts = [_count(one, shared, bos, stops, blank) for one in row]
        made.append({"counts": counts, **_columns(row, shared, columns)})
    return made


def _count(one: Spelt, prompt: int, bos: int | None, stops: set[int], blank: Callable[[int], bool]) -> dict[str, Any]:
    ids, last, begins = one.ids, len(one.ids) - 1, 0
    while last >= 0 and blank(ids[last]):
        last -= 1
    while begins < len(ids) and ids[begins] == bos:
        begins += 1
    differs = not one.text.startswith(one.prompt_text)
    is_stop = last >= 0 and ids[last] in stops
    return {"prompt": prompt, "total": len(ids), "stops": is_stop, "bos": begins, "differs": differs}


def _columns(row: Sequence[Spelt], shared: int, columns: Sequence[str]) -> dict[str, list[int]]:
    if "labels" in columns:
        ids = row[0].ids
        return {"input_ids": ids, "labels": [-100] * shared + ids[shared:]}
    if "prompt_ids" in columns:
        return dict(zip(columns, [row[0].ids[:shared], *(one.ids[shared:] for one in row)], strict=True))
    return dict(zip(columns, [one.ids for one in row], strict=bool(columns)))


def spell_rows(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", *, reads: str, tools: bool = True, first_row: int = 1
) -> list[list[Spelt]]:
    """Return the sequences of each row; arguments are those of ``encode_rows``.

    An answer begins where the tokens of the prompt alone and of the whole diverge, as TRL has it.
    Source: trl 1.16, trl/trainer/utils.py, ``common_prefix_length``

    Raises:
        ConfigError: there is no chat template, or it refuses a row.
    """
    pairs = [(number, *pair) for number, row in enumerate(rows) for pair in rendering.sequences_of(row, reads)]
    spelt: list[list[Spelt]] = [[] for _ in rows]
    if not pairs:
        return spelt
    is_chat = rendering.is_chat(rows[pairs[0][0]], reads)
    if is_chat:
        texts = rendering.render(rows, pairs, tokenizer, first_row, tools=tools)
    else:
        texts = [rendering.join(prompt, answer, tokenizer) for _, prompt, answer in pairs]
    prompts = list(dict.fromkeys(prompt for prompt, _ in texts if prompt))
    encoded = _encode([*prompts, *(text for _, text in texts)], tokenizer, special=not is_chat)
    alone, whole = dict(zip(prompts, encoded, strict=False)), encoded[len(prompts) :]
    for (number, _, answer), (prompt, text), ids in zip(pairs, texts, whole, strict=True):
        before = len(ids) if answer is None else _common_prefix(alone.get(prompt, []), ids)
        spelt[number].append(Spelt(ids, before, text, prompt))
    return spelt


def _encode(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, special: bool) -> list[list[int]]:
    """Encode texts; of chats, each piece between two special tokens once.

    A tokenizer splits a text at its special tokens first, and encodes what lies between them by itself. The first and
    last texts are also encoded whole, and if one of them differs all are.
    Source: https://huggingface.co/docs/tokenizers/api/added-tokens
    """
    splitting = [] if special else _splitting_tokens(tokenizer)
    if not splitting:
        return _to_ids(texts, tokenizer, special=special)
    between = re.compile("(" + "|".join(map(re.escape, sorted(splitting, key=len, reverse=True))) + ")")
    split = [between.split(text) for text in texts]
    pieces = list(dict.fromkeys(itertools.chain.from_iterable(split)))
    ids = dict(zip(pieces, _to_ids(pieces, tokenizer, special=False), strict=True))
    encoded = [list(itertools.chain.from_iterable(map(ids.__getitem__, one))) for one in split]
    compared = _to_ids([*texts[:COMPARED], *texts[-COMPARED:]], tokenizer, special=False)
    same = compared == [*encoded[:COMPARED], *encoded[-COMPARED:]]
    return encoded if same else _to_ids(texts, tokenizer, special=False)


def _splitting_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the tokens at which a text is split before anything else, into pieces that do not hang on each other.

    There are none where a token also takes the space around it, or where the first piece is marked as the first.
    """
    if not tokenizer.is_fast or "prepend_scheme=first" in repr(tokenizer.backend_tokenizer.pre_tokenizer):
        return []
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if not token.normalized]
    greedy = any(token.lstrip or token.rstrip or token.single_word for token in tokens)
    return [] if greedy or tokenizer.split_special_tokens else [token.content for token in tokens]


def _to_ids(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, special: bool) -> list[list[int]]:
    """Encode texts; with a fast tokenizer without the offsets and masks that nobody reads here."""
    if not tokenizer.is_fast or not texts:
        return tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"] if texts else []
    tokenizer("")  # switches padding and cutting off
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
    return [one.ids for one in encoded]


def _common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    if other[: len(one)] == one:
        return len(one)
    return next(place for place, (a, b) in enumerate(zip([*one, None], [*other, None], strict=False)) if a != b)
