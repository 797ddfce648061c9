"""Reading data files strictly: what is not UTF-8, not JSON or not a row is said, with file and line.

The readers of ``datasets`` and pandas guess: a GB18030 file is read as mojibake, a file that wraps its rows
becomes one row, a stray quote swallows the rest of a CSV file.
"""

import csv
import gzip
import io
import json
import re
import shlex
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import ConfigError
from runner.rows import BadRow, Row

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escaped: a character outside the basic plane, or half of one
_WRAPPERS = {"data", "rows", "examples", "instances", "items", "records", "train", "validation", "test"}
_BOMS = {
    b"\xff\xfe\x00\x00": "UTF-32LE",
    b"\x00\x00\xfe\xff": "UTF-32BE",
    b"\xff\xfe": "UTF-16LE",
    b"\xfe\xff": "UTF-16BE",
}
_KIN = {"GB18030": " (or BIG5, EUC-KR, SHIFT_JIS)", "WINDOWS-1252": " (or another European one)"}


@dataclass(frozen=True)
class RowFile:
    """Rows that are read from one file, or that one table holds.

    Attributes:
        name: of the file or table.
        items: lines of JSON that are not parsed yet, rows, or a ``datasets.Dataset``, which is read when asked.
        lines: line number of each item; empty where a format has none.
        about: path and size, for the manifest.
    """

    name: str
    items: Any
    lines: Sequence[int] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, Row | BadRow]]:
        """Yield where each row is from (``train.jsonl:17``), and the row or what is wrong with it."""
        wanted = range(len(self.items))[start:stop]
        items = self.items[start:stop] if isinstance(self.items, list) else self.items.select(wanted).to_list()
        for offset, item in zip(wanted, items, strict=True):
            origin = f"{self.name}:{self.lines[offset]}" if self.lines else f"{self.name} row {offset + 1}"
            yield origin, _row(item)


def read_file(path: Path) -> RowFile:
    """Read one data file, as its suffix says; lines of JSON are parsed only when their rows are asked for.

    Raises:
        ConfigError: the file is not UTF-8 (the message names the line, the likely encoding and the command that
            converts it), damaged, empty, or does not hold rows.
    """
    suffix = data_suffix(path)
    items: Any
    lines: Sequence[int] = ()
    if suffix == ".parquet":
        items = _read_parquet(path)
    else:
        text = _decode(path, _read_bytes(path))
        if not text.strip():
            raise ConfigError(f"Cannot read {path}: it is empty.")
        if suffix.startswith((".csv", ".tsv")):
            items, lines = _read_csv(path, text, "\t" if suffix.startswith(".tsv") else ",")
        elif text.lstrip().startswith("["):
            items = _read_json_list(path, text)
        else:
            items, lines = _read_json_lines(path, text)
    return RowFile(str(path), items, lines, {"path": str(path), "bytes": path.stat().st_size})


def data_suffix(path: Path) -> str:
    """Return the suffix that tells the format, in lower case, or nothing when this is no data file."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


# ---------------------------------------------------------------- bytes to text


def _read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if not path.name.lower().endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"Cannot read {path}: it is not a whole gzip file ({error}). Copy it again.") from error


def _decode(path: Path, data: bytes) -> str:
    for bom, encoding in _BOMS.items():
        if data.startswith(bom):
            raise ConfigError(_encoding_message(path, f"starts with the mark of {encoding}", encoding))
    if b"\0" in data:
        position = data.index(b"\0")
        found = f"holds at line {_line(data, position)} (byte {position}) a zero byte"
        wide = "UTF-16BE" if position == 0 else "UTF-16LE"
        raise ConfigError(_encoding_message(path, found, wide if data.count(b"\0") > len(data) / 4 else None))
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line, byte = _line(data, error.start), data[error.start]
        found = f"holds at line {line} (byte {error.start}) the byte 0x{byte:02x}, which is not UTF-8"
        raise ConfigError(_encoding_message(path, found, _likely_encoding(data))) from error


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _encoding_message(path: Path, found: str, encoding: str | None) -> str:
    if encoding is None:
        return f"Cannot read {path}: it {found}. Most of it is UTF-8, so it is damaged or cut off: copy it again."
    name = path.name.removesuffix(".gz").removesuffix(".GZ")
    stem, dot, suffix = name.rpartition(".")
    target = shlex.quote(str(path.with_name(f"{stem}.utf8{dot}{suffix}")))
    source = shlex.quote(str(path))
    command = (
        f"gzip -dc {source} | iconv -f {encoding} -t UTF-8 > {target}"
        if name != path.name
        else f"iconv -f {encoding} -t UTF-8 {source} > {target}"
    )
    return (
        f"Cannot read {path}: it {found}. Data files are UTF-8; this one is likely {encoding}"
        f"{_KIN.get(encoding, '')}. Type: {command}"
    )


def _likely_encoding(data: bytes) -> str | None:
    """Guess the encoding of bytes that are not UTF-8; None when they are UTF-8 with some damage."""
    text = data.decode("utf-8", errors="replace")
    good = sum(len(run) for run in re.findall(r"[^\x00-\x7f\ufffd]+", text))
    if good > 20 * text.count("\ufffd") or (good and text.count("\ufffd") == 1):
        return None
    runs = re.findall(rb"[\x80-\xff]+", data)
    if sum(map(len, runs)) >= 2 * len(runs):  # European letters stand alone between ASCII; East Asian bytes do not
        with suppress(UnicodeDecodeError):
            data.decode("gb18030")
            return "GB18030"
    return "WINDOWS-1252"


# ---------------------------------------------------------------- text to rows


def _row(item: Any) -> Row | BadRow:
    """Parse an item if it is still a line of JSON."""
    if isinstance(item, str):
        try:
            row = json.loads(item)
        except json.JSONDecodeError as error:
            return BadRow("line", f"is not JSON: {error.msg} at character {error.pos + 1}")
        except RecursionError:
            return BadRow("line", "is nested too deeply")
        return _check_row(row, may_have_surrogates=bool(_SURROGATE.search(item)))
    return item


def _check_row(row: Any, *, may_have_surrogates: bool = False) -> Row | BadRow:
    if not isinstance(row, dict):
        return BadRow("line", f"is a {type(row).__name__}, not an object with named columns")
    if may_have_surrogates:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return BadRow("line", "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return row


def _read_json_list(path: Path, text: str) -> list[Any]:
    may_have_surrogates = bool(_SURROGATE.search(text))
    try:
        return [_check_row(row, may_have_surrogates=may_have_surrogates) for row in json.loads(text)]
    except RecursionError as error:
        raise ConfigError(f"Cannot read {path}: it is nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"Cannot read {path}:{error.lineno}: it starts as a JSON list, and is not JSON at column "
            f"{error.colno} ({error.msg}). Mend it, or write one row as JSON on each line."
        ) from error


def _read_json_lines(path: Path, text: str) -> tuple[list[Any], list[int]]:
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(numbered) == 1 or isinstance(_row(numbered[0][1]), BadRow):
        try:
            whole = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            whole = None
        if isinstance(whole, dict):
            _refuse_wrapped(path, whole, several_lines=len(numbered) > 1)
    return [line for _, line in numbered], [number for number, _ in numbered]


def _refuse_wrapped(path: Path, whole: dict[str, Any], *, several_lines: bool) -> None:
    """Refuse a file that is one object around its rows."""
    lists = {key: value for key, value in whole.items() if isinstance(value, list) and value}
    rows = [
        key
        for key, value in lists.items()
        if all(isinstance(item, dict) and not {"role", "from"} & item.keys() for item in value[:10])
    ]
    if rows and (len(rows) == len(whole) or set(rows) & _WRAPPERS):
        commands = " and ".join(f"jq -c '.{key}[]' {shlex.quote(str(path))} > {key}.jsonl" for key in rows)
        raise ConfigError(
            f"Cannot read {path}: its rows are wrapped in an object, under {' and '.join(map(repr, rows))}. "
            f"A file is a list of rows, or one row as JSON on each line. Type: {commands}"
        )
    lengths = {len(value) for value in lists.values()}
    if len(lists) == len(whole) > 1 and len(lengths) == 1 and lengths != {1}:
        raise ConfigError(
            f"Cannot read {path}: it holds columns ({', '.join(lists)}), not rows. "
            "A file is a list of rows, or one row as JSON on each line."
        )
    if several_lines:
        raise ConfigError(
            f"Cannot read {path}: it is one object over several lines (keys {', '.join(list(whole)[:8])}). "
            "A file is a list of rows, or one row as JSON on each line."
        )


def _read_csv(path: Path, text: str, delimiter: str) -> tuple[list[Any], list[int]]:
    csv.field_size_limit(sys.maxsize)  # the default, 131,072 characters, is a short document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row | BadRow] = []
    lines: list[int] = []
    header: list[str] = []
    end = 0
    try:
        for cells in reader:
            start, end = end + 1, reader.line_num
            if not cells:
                continue
            if not header:
                header = _header(path, cells)
                continue
            lines.append(start)
            rows.append(
                dict(zip(header, cells, strict=True))
                if len(cells) == len(header)
                else BadRow("line", f"has {len(cells)} fields, where the header has {len(header)}")
            )
    except csv.Error as error:
        raise ConfigError(
            f"Cannot read {path}:{end + 1}: {error}. A field that starts with a quote ends with one, and quotes "
            "inside it are doubled."
        ) from error
    return rows, lines


def _header(path: Path, cells: list[str]) -> list[str]:
    if len(cells) == 1 and re.search(r"\w[;\t|]\w", cells[0]):
        raise ConfigError(
            f"Cannot read {path}: its header is one column, {cells[0]!r}. Columns are separated by a comma in .csv "
            "and by a tab in .tsv."
        )
    doubled = sorted({cell for cell in cells if cells.count(cell) > 1})
    if doubled or "" in cells:
        fault = f"two columns {doubled[0]!r}" if doubled else "a column without a name"
        raise ConfigError(f"Cannot read {path}: its first line, the header, has {fault}: {cells}.")
    return cells


def _read_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        return Dataset(InMemoryTable(pq.read_table(path)))  # decodes the types that datasets has written
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"Cannot read {path}: it is not a whole Parquet file ({error}).") from error
