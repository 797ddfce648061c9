"""Which keys exist, and of which type: our own groups, and upstream's dataclasses read from their source."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, lru_cache, partial
from importlib import import_module
from inspect import isfunction, signature
from pathlib import Path
from types import UnionType
from typing import Any, ForwardRef, Literal, Optional, Union, get_args, get_origin

from runner import source
from runner.errors import ConfigError


@dataclass
class Model:
    """Keys of the ``model`` group: a language model, its tokenizer and its chat template."""

    name_or_path: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    tokenizer_name_or_path: str | None = None
    chat_template: str | None = None
    pad_token: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass
class Dataset:
    """Keys of the ``dataset`` group; a ``generator`` adds its own keyword parameters."""

    path: str | list[str] | None = None
    name: str | None = None
    revision: str | None = None
    train: str = "train"
    eval: str | None = None
    format: str = "auto"
    rename: dict[str, str] = field(default_factory=dict)
    bad_rows: Literal["fail", "drop"] = "fail"
    too_long: Literal["drop", "fail", "truncate"] = "drop"
    weight: float = 1.0
    generator: str | None = None
    sources: dict[str, Any] = field(default_factory=dict)
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"


@dataclass
class Reward:
    """Keys of the ``reward`` group; a ``function`` adds its own keyword parameters."""

    function: str | None = None
    weight: float = 1.0
    model: dict[str, Any] | None = None
    terms: dict[str, Any] = field(default_factory=dict)


@dataclass
class Samples:
    """Keys of ``samples``: greedy generations on held-out prompts at every evaluation."""

    rows: int = 100
    max_new_tokens: int = 64
    batch_size: int = 50


@dataclass
class Launch:
    """Keys of the ``launch`` group: how many processes; ``fsdp`` and ``deepspeed`` hold accelerate's own fields."""

    processes: int | Literal["auto"] = 1
    nodes: int | Literal["auto"] = 1
    node_rank: int = 0
    rendezvous: str | None = None
    start_timeout: int = 600
    fsdp: dict[str, Any] | None = None
    deepspeed: dict[str, Any] | None = None


@dataclass
class Search:
    """Keys of the ``search`` group: what a sweep tries, and how. No part of a run's own config."""

    sampler: Literal["grid", "random", "tpe", "cmaes", "gp", "qmc"] = "grid"
    objective: str | list[str] | None = None
    direction: Literal["minimize", "maximize"] | list[Literal["minimize", "maximize"]] | None = None
    n_trials: int | None = None
    seed: int = 42
    n_jobs: int = 1
    gpus_per_trial: int | None = None
    timeout: float | None = None
    trial_timeout: float | None = None
    retries: int = 1
    pruner: Literal["none", "median", "asha", "hyperband"] = "none"
    stop_after_failures: int | None = None
    fail: Literal["all", "any"] = "all"
    resume: str | None = None
    params: dict[str, str] = field(default_factory=dict)


@dataclass
class Root:
    """Keys of a run as a whole."""

    seed: int = 42
    output_dir: str = "outputs"
    allow_code: list[str] = field(default_factory=list)
    value_model: dict[str, Any] | None = None
    max_seconds: float | None = None
    expect: dict[str, list[float]] | None = None
    check_expected: bool = False
    probe: bool = False
    global_batch_size: int | None = None
    share_prefixes: bool = True


# Numbers that none of the libraries refuses, or only once the weights are loaded.
LEAST = dict.fromkeys(["max_seconds", "trainer.temperature", "search.timeout", "search.trial_timeout"], 0.001)
LEAST |= dict.fromkeys(
    ["seed", "search.seed", "search.retries", "samples.rows", "trainer.learning_rate", "trainer.weight_decay",
     "trainer.max_grad_norm", "trainer.warmup_steps", "trainer.dataloader_num_workers", "trainer.beta",
     "trainer.desirable_weight", "trainer.undesirable_weight", "peft.lora_dropout"], 0) | dict.fromkeys(
    ["global_batch_size", "launch.processes", "launch.nodes", "samples.max_new_tokens", "samples.batch_size",
     "search.n_trials", "search.n_jobs", "search.gpus_per_trial", "search.stop_after_failures", "peft.r",
     "trainer.per_device_train_batch_size", "trainer.per_device_eval_batch_size", "trainer.max_length",
     "trainer.gradient_accumulation_steps", "trainer.max_completion_length", "trainer.max_prompt_length",
     "trainer.total_episodes"], 1)  # fmt: skip

# The groups whose keys are our own. The last two need not be there.
GROUPS = {
    "model": Model,
    "dataset": Dataset,
    "reward": Reward,
    "samples": Samples,
    "launch": Launch,
    "search": Search,
    "value_model": Model,
}
OPTIONAL = {"search", "value_model"}


@dataclass(frozen=True)
class Field:
    """One key of a config class: its type for checking, and as a person reads it, once somebody asks."""

    read: Callable[[], tuple[Any, str]]
    required: bool = False
    doc: str = ""
    choices: list[str] = field(default_factory=list)  # where its class names them
    type = property(lambda self: self.read()[0])
    text = property(lambda self: self.read()[1])

    def takes(self, value: Any) -> bool:
        """Tell whether a value is of the type; a ``float`` may be a whole number."""
        if _is_plainly(value, self.type):
            return True
        from pydantic import ValidationError  # it takes a while to import, and few values need it

        strict = "tuple" not in self.text and "set[" not in self.text
        with suppress(ValidationError):
            _adapter(self.type, strict).validate_python(value)
            return True
        return False


def _is_plainly(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_is_plainly(value, member) for member in inner)
    if origin is Literal:
        return any(type(value) is type(known) and value == known for known in inner)
    if origin in (list, Sequence) and type(value) is list:
        return all(_is_plainly(member, inner[0]) for member in value)
    return kind is Any or type(value) in ((float, int) if kind is float else (kind,))


@cache
def _adapter(kind: Any, strict: bool) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind, config=ConfigDict(strict=strict, arbitrary_types_allowed=True))


_TYPING = {
    name: kind
    for kind in (str, int, float, bool, list, dict, tuple, set)
    for name in (kind.__name__, kind.__name__.capitalize())
} | {"Any": Any, "Literal": Literal, "Optional": Optional, "Union": Union, "None": None, "Sequence": list}


def own_fields(cls: type) -> dict[str, Field]:
    """Return the keys of one of this module's dataclasses."""
    return {
        f.name: Field(partial(_own_type, f.type), required=f.default is MISSING and f.default_factory is MISSING)
        for f in fields(cls)
    }


def _own_type(kind: Any) -> tuple[Any, str]:
    return kind, kind.__name__ if isinstance(kind, type) else re.sub(r"typing\.|collections\.abc\.", "", str(kind))


def keyword_fields(module: str, function: str | None = None) -> dict[str, Field]:
    """Return the keyword-only parameters of one of our own functions, or of all of a module, as keys of an option.

    Raises:
        ConfigError: The module has no such function.
    """
    home, first = import_module(f"runner.{module}"), {"rewards": "completions"}.get(module)
    own = [member for member in vars(home).values() if isfunction(member) and member.__module__ == home.__name__]
    given = {member.__name__: list(signature(member).parameters.values()) for member in own}
    public = {name: ones for name, ones in given.items() if first in (None, *(one.name for one in ones[:1]))}
    if function is not None and function not in public:
        raise ConfigError(f"runner.{module} has no {function!r}; choose one of {sorted(public)}.")
    return {
        one.name: Field(partial(_own_type, one.annotation), required=one.default is one.empty)
        for name, ones in public.items()
        for one in ones
        if function in (None, name) and one.kind == one.KEYWORD_ONLY
    }


@lru_cache(maxsize=64)
def upstream_fields(target: str) -> dict[str, Field]:
    """Return the fields of an upstream config class, read from its source and its bases' source.

    Args:
        target: Dotted name, for example ``trl.DPOConfig``.

    Raises:
        ConfigError: The installed library has no such class.
    """
    return {
        key: Field(partial(_evaluate, text, path), doc=about.get("help", ""), choices=about.get("choices", []))
        for path, (key, text, about) in source.keys(*source.locate(target))
    }


def bases_of(target: str) -> tuple[str, ...]:
    """Return the class name of a config class and of all its bases, nearest first."""
    return tuple(name for _, name in source.lineage(*source.locate(target)))


@lru_cache(maxsize=1024)
def _evaluate(text: str, path: Path) -> tuple[Any, str]:
    """Return an annotation's type for checking, and its text for messages."""
    if "(" in text or "__" in text or not text.isascii():  # no call, whoever can write to the cache
        return Any, text
    others = {name: source.values(path, name) for name in set(re.findall(r"[A-Za-z_]\w*", text)) - _TYPING.keys()}
    enums = {name: Literal[values] for name, values in others.items() if values}
    try:  # builtins are emptied: the text is a type annotation of an installed library, never of a config
        kind = eval(text, {"__builtins__": {}}, {**dict.fromkeys(others, Any), **enums, **_TYPING})
    except (AttributeError, TypeError):  # part of it is a class that we do not know
        return Any, text
    for known in enums.values():
        text = " | ".join(get_args(known)) + (" | None" if "None" in text else "")
    kind = _allowed(kind, list(enums.values()))
    return _own_type(kind) if "'torch." in text else (kind, text)


def _allowed(kind: Any, enums: list[Any]) -> Any:
    """Return the values of a type that a config can give."""
    members = get_args(kind)
    if get_origin(kind) is Literal and any("_[" in str(value) for value in members):
        return str  # peft writes patterns among the values, such as 'pissa_niter_[number of iters]'
    if get_origin(kind) not in (Union, UnionType):
        return Any if "ForwardRef(" in str(kind) else kind
    # accelerate names torch's classes in quotes, as a config cannot: an object of theirs is no value of ours
    kept = [_allowed(member, enums) for member in members if not isinstance(member, ForwardRef)]
    # "SchedulerType | str": upstream turns the string into the enum, so only its values are right
    kept = [one for one in kept if one is not str or not any(enum in kept for enum in enums)]
    return Union[tuple(kept) or Any]  # noqa: UP007  of as many as there are
