"""Finding the splits of a dataset, on disk or on the hub, and the slices of them that a run reads."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from runner.errors import ConfigError
from runner.files import SUFFIXES, RowFile, data_suffix, read_file
from runner.hub import ensure_available
from runner.rows import BadRow, Row

logger = logging.getLogger(__name__)

_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "validation", "evaluation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_SHARD = re.compile(r"-\d{5}-of-\d{5}.*$")  # of data/train-00000-of-00001.parquet, as on the hub
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # not rows


@dataclass(frozen=True)
class Split:
    """The rows of a split, good and bad, in files or tables that are read when first asked for."""

    sources: tuple[Callable[[], RowFile], ...]

    @cached_property
    def files(self) -> list[RowFile]:
        """What the split is made of, read."""
        return [read() for read in self.sources]

    def __len__(self) -> int:
        """Count the rows."""
        return sum(len(file.items) for file in self.files)

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, Row | BadRow]]:
        """Yield the rows of a slice with their origins, see ``RowFile.rows``."""
        for file in self.files:
            size = len(file.items)
            yield from file.rows(max(start, 0), max(min(stop, size), 0))
            start, stop = start - size, stop - size


def find_splits(
    path: str | Sequence[str], *, name: str | None = None, revision: str | None = None
) -> Mapping[str, Split]:
    """Find the splits of a local file, folder or list of files, or else of a dataset on the hub.

    One file is ``train``, whatever its name. In a folder the names tell (``train*``, ``valid*``, ``dev*``,
    ``eval*``, ``test*``, ``data/train-00000-of-00002.parquet``, ``train/a.jsonl``); a file without such a
    word is a split of its own name, or ``train`` when there is no other. In a list, files without such a word
    are ``train``. Python files are not run, here or on the hub.

    Args:
        path: existing paths are local; what is shaped like ``name`` or ``owner/name`` is else a hub id.
        name: configuration of a hub dataset.
        revision: branch, tag or commit of a hub dataset.

    Raises:
        ConfigError: nothing is there, it holds no data file, or the hub cannot be reached and its cache has none.
    """
    if not isinstance(path, str):
        return _listed_splits([Path(entry).expanduser() for entry in path])
    found = Path(path).expanduser()
    if not found.exists() and may_be_hub_id(path):
        return _hub_splits(path, name, revision)
    if not found.exists():
        raise ConfigError(_missing(found))
    if name is not None or revision is not None:
        logger.warning("%s is local: dataset.name and dataset.revision have no effect", path)
    if found.is_dir():
        return _folder_splits(found)
    _check_suffix(found)
    return _group([("train", found)])


def cut(spec: str, splits: Mapping[str, Split], *, key: str) -> list[tuple[str, int, int]]:
    """Resolve a slice (``train``, ``train[:500]``, ``a[90%:]+b``) to names of splits with row ranges.

    Args:
        spec: as ``datasets`` reads it: rows or percent, negative from the end, several joined by ``+``.
        splits: the splits there are; ``valid``, ``dev`` and ``eval`` also find ``validation``.
        key: the config key that holds the slice, for messages.

    Raises:
        ConfigError: there is no such split, or no row in the slice.
    """
    from datasets import ReadInstruction

    wanted = [part.strip().split("[")[0] for part in spec.split("+")]
    names = {name: name if name in splits else _SPLIT_WORDS.get(name.lower(), name) for name in wanted}
    absent = [name for name in wanted if names[name] not in splits]
    if absent:
        first = next(iter(splits))
        raise ConfigError(
            f"{key}={spec!r} cannot be read: there is no split {' or '.join(map(repr, absent))}, only "
            f"{', '.join(splits)}. Type {key}={first}, or a slice, '{key}=\"{first}[90%:]\"'"
            f"{', or ' + key + '=null' if key.endswith('eval') else ''}."
        )
    lengths = {name: len(splits[names[name]]) for name in wanted}
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute(lengths)
    except ValueError as error:
        raise ConfigError(
            f"{key}={spec!r} is no slice ({error}). Slices look like train, train[:500], train[90%:] and "
            f"a+b[-100:]; with brackets, type '{key}=\"train[:500]\"'."
        ) from error
    for part, text in zip(parts, spec.split("+"), strict=True):
        length = lengths[part.splitname]
        if part.to <= part.from_:
            raise ConfigError(f"{key}={spec!r} has no row: {part.splitname} has {length} rows.")
        bounds = re.findall(r"(?<=[\[:])\d[\d_]*(?=[:\]])", text)
        if any(int(bound) > length for bound in bounds):
            logger.warning(
                "%s=%r asks for more than there is: %s has %d rows, and %d are used.",
                key, spec, part.splitname, length, part.to - part.from_,
            )  # fmt: skip
    return [(names[part.splitname], part.from_, part.to) for part in parts]


# ---------------------------------------------------------------- on disk


def _folder_splits(folder: Path) -> dict[str, Split]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        raise ConfigError(
            f"Cannot read {folder}: save_to_disk wrote it, in a format of its own. Write Parquet files instead: "
            "datasets.load_from_disk(...)['train'].to_parquet('train.parquet')."
        )
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and data_suffix(path) and path.name not in _ABOUT_DATA
        if not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    ]
    if not files:
        held = sorted(entry.name for entry in folder.iterdir())
        script = "; scripts (.py) are not run" if any(name.endswith(".py") for name in held) else ""
        raise ConfigError(
            f"There is no data file in {folder}: it holds {_few(held) or 'nothing'}{script}. Data files end in "
            f"{', '.join(SUFFIXES)}."
        )
    _refuse_twins(files)
    splits = [(_split_of(path.relative_to(folder)), path) for path in files]
    if len({name for name, _ in splits}) == 1 and splits[0][0] not in _SPLIT_WORDS.values():
        splits = [("train", path) for path in files]
    return _group(splits)


def _listed_splits(files: list[Path]) -> dict[str, Split]:
    for file in files:
        if file.is_dir():
            raise ConfigError(f"A list in dataset.path names files, and {file} is a folder. Type dataset.path={file}.")
        if not file.exists():
            raise ConfigError(_missing(file))
        _check_suffix(file)
    if not files:
        raise ConfigError("dataset.path is an empty list. Type dataset.path='[a.jsonl, b.jsonl]'.")
    return _group([(_named_split(file.name) or "train", file) for file in files])


def _split_of(path: Path) -> str:
    """Name the split of a file in a folder: from its name, else from the folders that it is in."""
    named = next(filter(None, map(_named_split, reversed(path.parts))), None)
    return named or re.sub(r"\W", "_", _SHARD.sub("", path.name[: -len(data_suffix(path))]))


def _named_split(name: str) -> str | None:
    words = re.split(r"[\W_\d]+", name.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _group(splits: list[tuple[str, Path]]) -> dict[str, Split]:
    grouped: dict[str, list[Callable[[], RowFile]]] = {}
    for name, path in splits:
        grouped.setdefault(name, []).append(partial(read_file, path))
    return {name: Split(tuple(sources)) for name, sources in grouped.items()}


def _refuse_twins(files: list[Path]) -> None:
    """Refuse ``train.csv`` beside ``train.jsonl``: most likely one was made from the other."""
    seen: dict[str, Path] = {}
    for path in files:
        stem = str(path)[: -len(data_suffix(path))]
        if stem in seen:
            raise ConfigError(
                f"{seen[stem]} and {path} have one name and two formats, so rows might be read twice. Remove one, "
                f"or name the file to read: dataset.path={path}."
            )
        seen[stem] = path


def _check_suffix(path: Path) -> None:
    if not data_suffix(path):
        raise ConfigError(f"Cannot read {path}: data files end in {', '.join(SUFFIXES)}.")


def may_be_hub_id(path: str) -> bool:
    """Tell whether a path that is not there is shaped like the id of a dataset on the hub."""
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or data_suffix(Path(path)):
        return False
    return "/" not in path or not Path(path).parent.is_dir()


def _missing(path: Path) -> str:
    present = next(parent for parent in path.absolute().parents if parent.exists())
    wanted = path.absolute().relative_to(present).parts[0]
    names = sorted(entry.name for entry in present.iterdir()) if present.is_dir() else []
    near = get_close_matches(wanted, names, n=3)
    there = f"Did you mean {' or '.join(str(present / name) for name in near)}?" if near else f"It has {_few(names)}."
    return f"There is no {path}: {present} has no {wanted}. {there}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# ---------------------------------------------------------------- on the hub


def _hub_splits(path: str, name: str | None, revision: str | None) -> dict[str, Split]:
    import datasets
    from huggingface_hub import constants

    try:
        ensure_available(path, key="dataset.path", revision=revision, kind="dataset", marker="README.md")
    except ConfigError:
        if not Path(datasets.config.HF_DATASETS_CACHE, path.replace("/", "___")).is_dir():
            raise
        logger.warning("The hub does not answer: %s comes from the cache of datasets", path)
        constants.HF_HUB_OFFLINE = True  # as ensure_available does: no retries
    try:
        loaded = datasets.load_dataset(path, name, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ConfigError(
            f"Cannot read dataset.path={path}: it is no local path, and on the hub: {error} A private or gated one "
            "needs `hf auth login`."
        ) from error
    except (ConnectionError, ValueError, RuntimeError, FileNotFoundError) as error:  # no such name, a script, ...
        raise ConfigError(f"Cannot read dataset.path={path} from the hub: {error}") from error
    return {split: Split((partial(_hub_table, path, revision, split, table),)) for split, table in loaded.items()}


def _hub_table(path: str, revision: str | None, split: str, table: Any) -> RowFile:
    """Describe a table of a hub dataset; without the hub, its cache may hold another commit than the wanted one."""
    # datasets names the folder of its cache after the commit.
    commit = next((Path(file["filename"]).parent.name for file in table.cache_files), None)
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision) and commit != revision:
        raise ConfigError(
            f"Cannot read dataset.path={path} at dataset.revision={revision}: the hub's cache holds {commit}. Go "
            "online, or type that revision."
        )
    return RowFile(f"{path} {split}", table, about={"path": path, "commit": commit})
