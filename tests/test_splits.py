import json
import logging

import pytest

from runner.errors import ConfigError
from runner.splits import cut, find_splits


def make(folder, *names, rows=3):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            from datasets import Dataset

            Dataset.from_list([{"file": name, "n": n} for n in range(rows)]).to_parquet(path)
        else:
            path.write_text("".join(json.dumps({"file": name, "n": n}) + "\n" for n in range(rows)))
    return folder


def held(splits):
    return {name: [row["file"] for _, row in split.rows(0, len(split))][::3] for name, split in splits.items()}


def refusal(function, *arguments, **options):
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def read(spec, splits):
    return [
        row["n"]
        for name, start, stop in cut(spec, splits, key="dataset.train")
        for _, row in splits[name].rows(start, stop)
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "validation.jsonl"], {"train": ["train.jsonl"], "validation": ["validation.jsonl"]}),
        (["my-train_v2.jsonl", "dev.jsonl", "test_1.jsonl"],
         {"train": ["my-train_v2.jsonl"], "validation": ["dev.jsonl"], "test": ["test_1.jsonl"]}),
        (["rows.jsonl"], {"train": ["rows.jsonl"]}),
        (["descriptiveness.jsonl", "sentiment.jsonl"],
         {"descriptiveness": ["descriptiveness.jsonl"], "sentiment": ["sentiment.jsonl"]}),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
         {"train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
          "test": ["data/test-00000-of-00001.parquet"]}),
        (["data/poems-00000-of-00001.parquet", "data/prose-00000-of-00001.parquet"],
         {"poems": ["data/poems-00000-of-00001.parquet"], "prose": ["data/prose-00000-of-00001.parquet"]}),
        (["train/a.jsonl", "train/b.jsonl", "eval/a.jsonl"],
         {"train": ["train/a.jsonl", "train/b.jsonl"], "validation": ["eval/a.jsonl"]}),
        (["restraint.jsonl", "constrained.jsonl"],
         {"restraint": ["restraint.jsonl"], "constrained": ["constrained.jsonl"]}),
    ],
    ids=["plain", "words in names", "one file", "named splits", "shards", "named shards", "folders", "words in words"],
)  # fmt: skip
def test_the_names_in_a_folder_tell_its_splits(tmp_path, names, expected):
    found = held(find_splits(str(make(tmp_path, *names))))
    assert {name: sorted(files) for name, files in found.items()} == expected


def test_what_is_no_data_is_passed_over(tmp_path):
    make(tmp_path, "train.jsonl", ".cache/train.jsonl", "__pycache__/train.json", "dataset_infos.json")
    (tmp_path / "README.md").write_text("about")
    assert held(find_splits(str(tmp_path))) == {"train": ["train.jsonl"]}


def test_a_loading_script_is_not_run(tmp_path):
    trap = tmp_path / "run"
    (tmp_path / "data.py").write_text(f"open({str(trap)!r}, 'w')")
    assert "it holds data.py; scripts (.py) are not run" in refusal(find_splits, str(tmp_path))
    find_splits(str(make(tmp_path, "train.jsonl")))
    assert not trap.exists()


def test_one_file_is_train_whatever_its_name(tmp_path):
    make(tmp_path, "validation.jsonl")
    assert held(find_splits(str(tmp_path / "validation.jsonl"))) == {"train": ["validation.jsonl"]}


def test_a_list_of_files_is_train_but_for_those_that_say_otherwise(tmp_path):
    make(tmp_path, "a.jsonl", "b.jsonl", "test.jsonl")
    paths = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "test.jsonl")]
    assert held(find_splits(paths)) == {"train": ["a.jsonl", "b.jsonl"], "test": ["test.jsonl"]}


def test_one_name_in_two_formats_is_refused(tmp_path):
    make(tmp_path, "train.jsonl")
    (tmp_path / "train.csv").write_text("file,n\na,1\n")
    assert "one name and two formats" in refusal(find_splits, str(tmp_path))


def test_a_folder_of_save_to_disk_is_refused(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    assert "save_to_disk wrote it" in refusal(find_splits, str(tmp_path))


def test_a_missing_path_names_near_ones(tmp_path):
    make(tmp_path, "tldr/train.jsonl")
    assert f"Did you mean {tmp_path}/tldr?" in refusal(find_splits, str(tmp_path / "tdlr"))
    assert f"{tmp_path}/tldr has no trian.jsonl. Did you mean {tmp_path}/tldr/train.jsonl?" in (
        refusal(find_splits, [str(tmp_path / "tldr/trian.jsonl")])
    )


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "rows.xlsx").write_text("")
    assert "data files end in .jsonl" in refusal(find_splits, str(tmp_path / "rows.xlsx"))


def test_an_unreachable_hub_is_said_at_once():
    # tests set HF_HUB_OFFLINE
    assert "not in the hub's cache" in refusal(find_splits, "nobody/nothing")


def test_a_dataset_in_the_cache_is_read_without_the_hub(tmp_path, monkeypatch):
    import datasets

    # The cache of a hub dataset, as datasets lays it out: made from local files, then moved to the hub's place.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    datasets.load_dataset_builder(str(make(tmp_path / "name", "train.jsonl"))).download_and_prepare()
    commit = "0123456789" * 4
    made = next(tmp_path.rglob("name-train.arrow")).parent
    (tmp_path / "owner___name" / "default" / "0.0.0").mkdir(parents=True)
    made.rename(tmp_path / "owner___name" / "default" / "0.0.0" / commit)

    split = find_splits("owner/name")["train"]
    assert [row["n"] for _, row in split.rows(0, 3)] == [0, 1, 2]
    assert split.files[0].about == {"path": "owner/name", "commit": commit}
    assert f"cache holds {commit}" in refusal(len, find_splits("owner/name", revision="a" * 40)["train"])


@pytest.mark.parametrize(
    "spec", ["train", "train[:4]", "train[4:]", "train[-3:]", "train[:25%]", "train[90%:]", "train[2:4]+test[:1]"]
)
def test_slices_are_those_of_datasets(tmp_path, spec):
    from datasets import Dataset, load_dataset

    make(tmp_path, "train.jsonl", rows=10)
    make(tmp_path, "test.jsonl", rows=2)
    expected = load_dataset(str(tmp_path), split=spec, cache_dir=str(tmp_path / ".cache"))
    assert isinstance(expected, Dataset)
    assert read(spec, find_splits(str(tmp_path))) == expected["n"]


def test_a_slice_may_span_files(tmp_path):
    # a has n = 0 1 2, b has n = 0 1 2: rows 2 to 5 of both are 2, 0, 1
    make(tmp_path, "train-a.jsonl", "train-b.jsonl")
    assert read("train[2:5]", find_splits(str(tmp_path))) == [2, 0, 1]


def test_a_split_is_found_under_its_usual_names(tmp_path):
    splits = find_splits(str(make(tmp_path, "dev.jsonl", "train.jsonl")))
    assert cut("valid[:2]", splits, key="dataset.eval") == [("validation", 0, 2)]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("validation", "there is no split 'validation', only train"),
        ("train[:5", "is no slice"),
        ("train[a:b]", "is no slice"),
        ("train[5:]", "has no row: train has 3 rows"),
        ("train[2:1]", "has no row: train has 3 rows"),
    ],
)
def test_a_slice_that_cannot_be_had_is_refused(tmp_path, spec, told):
    splits = find_splits(str(make(tmp_path, "train.jsonl")))
    message = refusal(cut, spec, splits, key="dataset.eval")
    assert message.startswith(f"dataset.eval={spec!r}")
    assert told in message


def test_a_slice_that_gets_less_than_it_asks_for_is_logged(tmp_path, caplog):
    splits = find_splits(str(make(tmp_path, "train.jsonl")))
    with caplog.at_level(logging.WARNING):
        assert cut("train[1:500]", splits, key="dataset.train") == [("train", 1, 3)]
        assert "train has 3 rows, and 2 are used" in caplog.text
        caplog.clear()
        cut("train[:3]", splits, key="dataset.train")
        assert not caplog.text
