import os
import sys

import pytest

from runner import schema, source

CODE = """
import enum
from dataclasses import dataclass, field
from typing import Optional, Union
from .base import Base as First

class Speed(enum.Enum):
    SLOW = "slow"
    FAST = "fast"

@dataclass
class Config(First):
    speed: Union[str, Speed] = field(default="slow", metadata={"help": "how fast"})
    danger: "().__class__" = None
    disguised: "[]._\uff3fclass_\uff3f" = None
    nested: Optional[dict[str, Union["Speed", list[str]]]] = None
    theirs: Union["torch.dtype", "torch.device"] = None
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A library that is installed, and an empty cache."""
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "library" / "installed_here"
    folder.mkdir(parents=True)
    (folder / "base.py").write_text("class Base:\n    steps: int = 1\n")
    (folder / "__init__.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder.parent))
    yield folder
    forget()


def forget():
    """Be a new process."""
    for remembered in (source.read, source.parse, source.find_class, source.locate, schema.upstream_fields):
        remembered.cache_clear()


def read():
    forget()
    return schema.upstream_fields("installed_here.Config")


def test_fields_are_those_of_the_class_and_its_bases_and_nothing_is_imported(package):
    fields = read()
    assert list(fields) == ["steps", "speed", "danger", "disguised", "nested", "theirs"]
    assert fields["steps"].type is int
    assert (fields["speed"].text, fields["speed"].doc) == ("slow | fast", "how fast")
    assert schema.bases_of("installed_here.Config") == ("Config", "Base")
    assert "installed_here" not in sys.modules


def test_a_text_that_is_no_annotation_is_not_evaluated(package):
    assert read()["danger"].takes("anything")
    assert read()["disguised"].takes("anything")


def test_what_names_a_class_that_no_config_can_give_takes_anything_else(package):
    assert read()["nested"].takes({"all": ["Linear"]})
    assert read()["theirs"].takes("float32")


def test_what_a_module_says_is_kept_until_its_file_changes(package):
    read()
    kept = sorted((package.parent.parent / "cache" / "source").iterdir())
    assert [file.name.partition("-")[0] for file in kept] == ["__init__", "base"]
    times = (package / "base.py").stat()
    (package / "base.py").write_text("class Base:\n    stop_: int = 1\n")
    os.utime(package / "base.py", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "steps" in read()  # size and time are the same: it was not read again
    os.utime(package / "base.py", ns=(0, 0))
    assert "stop_" in read()


def test_a_name_that_upstream_turns_into_an_enum_is_one_of_its_values():
    assert not schema.upstream_fields("peft.LoraConfig")["task_type"].takes("CAUSAL_ML")
    assert schema.upstream_fields("peft.LoraConfig")["task_type"].takes("CAUSAL_LM")
