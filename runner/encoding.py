"""Rows to token ids as TRL prepares them: in one batched pass, kept on disk for whoever reads the same rows again."""

import hashlib
import inspect
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError
from runner.rows import Row

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHUNK_ROWS = 1_000  # tokens of so many rows are held at once
COMPARED = 16  # texts of a chunk that are encoded both ways
KEPT_DAYS = 30  # since a file was last read
PASSED_ON = ("label", "margin")  # columns that a trainer reads beside token ids

# What each trainer is given instead of text; the others prepare their rows themselves, and here are only counted.
IDS = {
    "sft": ("input_ids", "labels"),
    "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "kto": ("prompt_ids", "completion_ids"),
    "reward": ("chosen_ids", "rejected_ids"),
}

Content = str | list[dict[str, Any]]  # text or messages


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
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    reads: str,
    trainer: str = "",
    tools: bool = True,
    name: str = "train",
) -> "Dataset":
    """Return the token ids and the counts of every row, from the disk if they were made before.

    The file is named after what its content follows from: the rows, the tokenizer with its chat template, what is
    asked for, and this module. Processes that want the same one at once make it once. It lies in the folder of
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
    from datasets import config

    columns = IDS.get(trainer, ()) if trainer in ("sft", "reward") or "prompt" in dataset.column_names else ()
    features = _features(dataset, columns)

    def chunk(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        made = encode_rows(rows, tokenizer, reads=reads, columns=columns, tools=tools, first_row=numbers[0] + 1)
        return {key: [row[key] for row in made] for key in ("counts", *columns)}

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
    """Return a SHA-256 of the rows and of this module, which more can be added to."""
    import pyarrow as pa

    found = hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode())
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
    stops = _stop_tokens(tokenizer, is_chat=_is_chat(rows[0], reads)) if rows else set()
    blank: dict[int, bool] = {}
    made = []
    for row in spelt:
        shared = min((one.prompt for one in row), default=0)  # of two answers, what both go on from
        counts = [_count(one, shared, tokenizer, stops, blank) for one in row]
        made.append({"counts": counts, **_columns(row, shared, columns)})
    return made


def _count(
    one: Spelt, prompt: int, tokenizer: "PreTrainedTokenizerBase", stops: set[int], blank: dict[int, bool]
) -> dict[str, Any]:
    last = None
    for token in reversed(one.ids):
        if token not in blank:
            blank[token] = not str(tokenizer.decode([token])).strip()
        if not blank[token]:
            last = token
            break
    bos = next((place for place, token in enumerate(one.ids) if token != tokenizer.bos_token_id), len(one.ids))
    differs = not one.text.startswith(one.prompt_text)
    return {"prompt": prompt, "total": len(one.ids), "stops": last in stops, "bos": bos, "differs": differs}


def _columns(row: Sequence[Spelt], shared: int, columns: Sequence[str]) -> dict[str, list[int]]:
    if "labels" in columns:
        ids = row[0].ids
        return {"input_ids": ids, "labels": [-100] * shared + ids[shared:]}
    if "prompt_ids" in columns:
        return dict(zip(columns, [row[0].ids[:shared], *(one.ids[shared:] for one in row)], strict=True))
    return dict(zip(columns, [one.ids for one in row], strict=bool(columns)))


def spell_rows(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    reads: str,
    tools: bool = True,
    first_row: int = 1,
) -> list[list[Spelt]]:
    """Return the sequences of each row; arguments are those of ``encode_rows``.

    An answer begins where the tokens of the prompt alone and of the whole diverge, as TRL has it.
    Source: trl 1.16, trl/trainer/utils.py, ``common_prefix_length``

    Raises:
        ConfigError: there is no chat template, or it refuses a row.
    """
    pairs = [(number, *pair) for number, row in enumerate(rows) for pair in _sequences(row, reads)]
    spelt: list[list[Spelt]] = [[] for _ in rows]
    if not pairs:
        return spelt
    is_chat = _is_chat(rows[pairs[0][0]], reads)
    if is_chat:
        texts = _render(rows, pairs, tokenizer, first_row, tools=tools)
    else:
        texts = [_join(prompt, answer, tokenizer) for _, prompt, answer in pairs]
    prompts = list(dict.fromkeys(prompt for prompt, _ in texts if prompt))
    alone = dict(zip(prompts, _to_ids(prompts, tokenizer, special=not is_chat), strict=True))
    whole = _encode(texts, alone, tokenizer, special=not is_chat)
    for (number, _, answer), (prompt, text), ids in zip(pairs, texts, whole, strict=True):
        before = len(ids) if answer is None else _common_prefix(alone.get(prompt, []), ids)
        spelt[number].append(Spelt(ids, before, text, prompt))
    return spelt


def _encode(
    texts: Sequence[tuple[str, str]],
    alone: dict[str, list[int]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    special: bool,
) -> list[list[int]]:
    """Encode whole chats, of which the prompts are encoded: only from the last special token of the prompt on.

    A tokenizer splits a text at its special tokens first, and what lies between them is encoded by itself. The first
    texts are also encoded in one piece, and if one of them differs all are.
    Source: https://huggingface.co/docs/tokenizers/api/added-tokens
    """
    splits = {}
    if tokenizer.is_fast and not special:
        added = tokenizer.added_tokens_decoder.items()
        splits = {number: token.content for number, token in added if token.special and not token.normalized}
    heads: list[tuple[int, int]] = []  # of each text, what is encoded: characters, and the ids that these give
    for prompt, text in texts:
        ids = alone.get(prompt, [])
        last = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] in splits), None)
        start = prompt.rfind(splits[ids[last]]) if last is not None and text.startswith(prompt) else -1
        heads.append((start, last) if last is not None and start >= 0 else (0, 0))
    tails = _to_ids(
        [text[start:] for (_, text), (start, _) in zip(texts, heads, strict=True)], tokenizer, special=special
    )
    whole = [
        alone.get(texts[n][0], [])[:last] + tail for n, ((_, last), tail) in enumerate(zip(heads, tails, strict=True))
    ]
    if any(last for _, last in heads):
        compared = [text for _, text in texts[:COMPARED]]
        if _to_ids(compared, tokenizer, special=special) != whole[:COMPARED]:
            return _to_ids([text for _, text in texts], tokenizer, special=special)
    return whole


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


# ---------------------------------------------------------------- rows to text


def _is_chat(row: Row, reads: str) -> bool:
    return any(isinstance(part, list) for pair in _sequences(row, reads)[:1] for part in pair)


def _sequences(row: Row, reads: str) -> list[tuple[Content | None, Content | None]]:
    """Split a row into the sequences that are trained on, each of a prompt and an answer."""
    prompt = row.get("prompt")
    if reads != "prompt":
        for columns in (("completion",), ("chosen", "rejected"), ("messages",), ("text",)):
            if all(row.get(column) is not None for column in columns):
                return [(prompt, row[column]) for column in columns]
    return [] if prompt is None else [(prompt, None)]


def _join(prompt: Any, answer: Any, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """Return a text prompt and the whole text."""
    prompt = prompt or ""
    if answer is None:
        return prompt, prompt
    end = "" if answer.endswith(tokenizer.eos_token) else tokenizer.eos_token
    return prompt, prompt + answer + end


def _render(
    rows: Sequence[Row],
    pairs: Sequence[tuple[int, Any, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    first_row: int,
    *,
    tools: bool,
) -> list[tuple[str, str]]:
    """Return each chat's prompt and the whole chat, as the chat template writes them; a row's prompt is written once.

    Rows that tell the template the same beside their chats are written together.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ConfigError(
            "Rows of messages need a chat template, and the tokenizer has none. Type model.chat_template=FILE.jinja."
        )

    def told(pair: tuple[int, Any, Any]) -> dict[str, Any]:
        row = rows[pair[0]]
        named = row.get("tools") if tools else None
        more = (row.get("chat_template_kwargs") if tools else None) or {}
        return {"tools": json.loads(named) if isinstance(named, str) else named, **more}

    written: list[tuple[str, str]] = []
    for options, group in groupby(pairs, told):
        alike = list(group)
        try:
            written += _write(alike, tokenizer, options)
        except (TemplateError, TypeError) as error:
            for _, alone in groupby(alike, lambda pair: pair[0]) if alike[0][0] != alike[-1][0] else ():
                _render(rows, list(alone), tokenizer, first_row, tools=tools)  # to find the row
            raise ConfigError(
                f"The chat template refuses row {first_row + alike[0][0]}: {error}. Leave such rows out, or choose "
                "another template with model.chat_template=FILE.jinja."
            ) from error
    return written


def _write(
    pairs: Sequence[tuple[int, Any, Any]], tokenizer: "PreTrainedTokenizerBase", options: dict[str, Any]
) -> list[tuple[str, str]]:
    def write(chats: list[Any], **more: bool) -> list[str]:
        return tokenizer.apply_chat_template(chats, tokenize=False, **options, **more) if chats else []  # type: ignore

    prompts = {number: prompt for number, prompt, _ in pairs if prompt}
    before = dict(zip(prompts, write(list(prompts.values()), add_generation_prompt=True), strict=True))
    whole = iter(write([(prompt or []) + answer for _, prompt, answer in pairs if answer is not None]))
    return [
        (before.get(number, ""), before.get(number, "") if answer is None else next(whole))
        for number, _, answer in pairs
    ]


def _stop_tokens(tokenizer: "PreTrainedTokenizerBase", *, is_chat: bool) -> set[int]:
    """Return the tokens that end a text, or a turn in the chat template."""
    stops = {tokenizer.eos_token_id}
    if is_chat:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\u2042"}]
        end = str(tokenizer.apply_chat_template(probe, tokenize=False)).rpartition("\u2042")[2].strip()
        stops |= set(tokenizer(end, add_special_tokens=False)["input_ids"][:1])
    return stops
