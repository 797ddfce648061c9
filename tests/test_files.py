import gzip
import json

import pytest

from runner.errors import ConfigError
from runner.files import read_file
from runner.rows import BadRow

ROWS = [{"prompt": "两地相距", "completion": "八公里"}, {"prompt": "Où ?", "completion": "Là, à côté\u2028🙂"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def rows(path):
    file = read_file(path)
    return list(file.rows(0, len(file.items)))


def faults(path):
    return [str(row) for _, row in rows(path) if isinstance(row, BadRow)]


def refusal(path):
    with pytest.raises(ConfigError) as caught:
        read_file(path)
    return str(caught.value)


def as_csv(separator):
    cells = [["prompt", "completion"], *(list(row.values()) for row in ROWS)]
    return "".join(separator.join(f'"{cell}"' for cell in line) + "\r\n" for line in cells)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\n")),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", LINES),
        ("a.csv", as_csv(",")),
        ("a.tsv", as_csv("\t")),
    ],
    ids=["jsonl", "byte order mark, CRLF, blank lines", "json", "lines in .json", "csv", "tsv"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_every_text_format_gives_the_same_rows(tmp_path, name, text, packed):
    data = gzip.compress(text.encode()) if packed else text.encode()
    assert [row for _, row in rows(write(tmp_path / (name + ".gz" * packed), data))] == ROWS


def test_parquet_gives_the_same_rows(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == [(f"{tmp_path}/a.parquet row {n}", row) for n, row in enumerate(ROWS, 1)]


def test_a_row_knows_its_line(tmp_path):
    # CSV: the header is line 1, the first row spans lines 2 and 3
    csv = write(tmp_path / "a.csv", 'prompt,completion\n"two\nlines",x\ny,z\n')
    jsonl = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert [origin for origin, _ in rows(csv)] == [f"{csv}:2", f"{csv}:4"]
    assert [origin for origin, _ in rows(jsonl)] == [f"{jsonl}:1", f"{jsonl}:3"]


@pytest.mark.parametrize(
    ("encoding", "likely"),
    [("gb18030", "GB18030"), ("utf-16", "UTF-16LE"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")],
)
def test_another_encoding_is_refused_with_the_command_that_converts_it(tmp_path, encoding, likely):
    path = write(tmp_path / "train.jsonl", json.dumps(ROWS[0], ensure_ascii=False).encode(encoding))
    assert f"iconv -f {likely} -t UTF-8 {path} > {tmp_path}/train.utf8.jsonl" in refusal(path)


def test_latin_1_is_refused_naming_line_and_byte(tmp_path):
    # '{"a": "b"}\n' has 11 bytes, '{"a": "' 7: the é is byte 18, on line 2
    path = write(tmp_path / "a.jsonl", '{"a": "b"}\n{"a": "é t"}\n'.encode("latin-1"))
    message = refusal(path)
    assert "line 2 (byte 18) the byte 0xe9" in message
    assert "likely WINDOWS-1252" in message


def test_utf_8_with_one_broken_byte_is_called_damaged(tmp_path):
    assert "damaged or cut off" in refusal(write(tmp_path / "a.jsonl", LINES.encode()[:20]))
    assert "damaged or cut off" in refusal(write(tmp_path / "b.jsonl", LINES.replace("八", "\0")))


def test_a_compressed_file_is_converted_through_gzip(tmp_path):
    path = write(tmp_path / "a.csv.gz", gzip.compress("prompt,completion\n问,答\n".encode("gb18030")))
    assert f"gzip -dc {path} | iconv -f GB18030" in refusal(path)


def test_a_cut_off_archive_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(LINES.encode() * 50)[:-20])
    assert "not a whole gzip file" in refusal(path)
    assert "not a whole Parquet file" in refusal(write(tmp_path / "a.parquet", b"PAR1"))


def test_an_empty_file_is_refused(tmp_path):
    assert "it is empty" in refusal(write(tmp_path / "a.jsonl", "\n"))


def test_broken_lines_are_bad_rows_and_the_others_are_read(tmp_path):
    text = '{"a": 1}\n{"a": 2\n["a"]\n{"a": "\\ud83d"}\n{"a": "\\ud83d\\ude42"}\n'
    path = write(tmp_path / "a.jsonl", text)
    assert [row for _, row in rows(path) if not isinstance(row, BadRow)] == [{"a": 1}, {"a": "🙂"}]
    assert faults(path) == [
        "line is not JSON: Expecting ',' delimiter at character 8",
        "line is a list, not an object with named columns",
        "line holds half of a surrogate pair (\\ud800 to \\udfff), which is no character",
    ]


def test_a_broken_json_list_is_refused_naming_the_line(tmp_path):
    path = write(tmp_path / "a.json", '[{"a": 1},\n {"a": 2}\n {"a": 3}]')
    assert f"{path}:3" in refusal(path)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("extra", [{}, {"version": "1.1"}])
def test_rows_wrapped_in_an_object_are_refused_naming_the_key(tmp_path, indent, extra):
    path = write(tmp_path / "a.json", json.dumps({**extra, "data": ROWS}, indent=indent))
    assert f"under 'data'. A file is a list of rows, or one row as JSON on each line. Type: jq -c '.data[]' {path}" in (
        refusal(path)
    )


def test_splits_wrapped_in_an_object_are_refused_naming_each(tmp_path):
    message = refusal(write(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS})))
    assert "'train' and 'test'" in message


def test_columns_instead_of_rows_are_refused(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"prompt": ["a", "b"], "completion": ["c", "d"]}))
    assert "it holds columns (prompt, completion), not rows" in refusal(path)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
    ],
)
def test_a_single_chat_is_a_row_and_not_a_wrapper(tmp_path, row):
    assert rows(write(tmp_path / "a.jsonl", json.dumps(row)))[0][1] == row


def test_a_row_printed_over_several_lines_is_refused(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"prompt": "a", "completion": "b"}, indent=1))
    assert "one object over several lines (keys prompt, completion)" in refusal(path)


def test_csv_lines_of_another_width_are_bad_rows(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,completion\na,b\na\na,b,c\n")
    assert faults(path) == [
        "line has 1 fields, where the header has 2",
        "line has 3 fields, where the header has 2",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('prompt,completion\na,b\n"c,d\ne,f\n', ":3: unexpected end of data"),
        ('prompt,completion\na,b\n"c"d,e\n', ":3: ',' expected after '\"'"),
        ("prompt,prompt\na,b\n", "two columns 'prompt'"),
        ("prompt,\na,b\n", "a column without a name"),
        ("prompt;completion\na;b\n", "its header is one column, 'prompt;completion'"),
    ],
    ids=["open quote", "quote inside", "doubled column", "nameless column", "semicolons"],
)
def test_a_csv_file_that_cannot_be_trusted_is_refused(tmp_path, text, told):
    assert told in refusal(write(tmp_path / "a.csv", text))


def test_a_long_csv_field_is_read(tmp_path):
    # csv's own limit is 131,072 characters
    path = write(tmp_path / "a.csv", f"prompt,completion\n{'a' * 200_000},b\n")
    assert len(rows(path)[0][1]["prompt"]) == 200_000


def test_only_the_rows_asked_for_are_parsed(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\nbroken\n')
    assert [row for _, row in read_file(path).rows(0, 2)] == [{"a": 1}, {"a": 2}]
