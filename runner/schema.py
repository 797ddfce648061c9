"""Which keys exist, and of which type: our own groups, and upstream's dataclasses read from their source.

Upstream's classes are read with ``ast`` and never imported: a misspelt key is answered in a fraction of a
second, without torch, a device or a hub.
"""

import ast
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Optional, Union, get_args, get_origin

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
    if origin is list and type(value) is list:
        return all(_is_plainly(member, inner[0]) for member in value)
    return kind is Any or type(value) in ((float, int) if kind is float else (kind,))


@cache
def _adapter(kind: Any, strict: bool) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(kind, config=ConfigDict(strict=strict, arbitrary_types_allowed=True))


# Classes that moved or went, and the versions that have them. Source: https://github.com/huggingface/trl/releases
HISTORY = {
    "trl.PPOConfig": "trl <1.13 had it; runner.ppo.PPOConfig (trainer=ppo) replaces it",
    "trl.experimental.ppo.PPOConfig": "trl <1.13 had it; runner.ppo.PPOConfig (trainer=ppo) replaces it",
    "trl.ORPOConfig": "since trl 0.26 it is trl.experimental.orpo.ORPOConfig",
    "trl.CPOConfig": "since trl 0.26 it is trl.experimental.cpo.CPOConfig",
    "trl.experimental.orpo.ORPOConfig": "trl >=0.26 has it, and trl 1.16 is what this was tested with",
    "trl.experimental.cpo.CPOConfig": "trl >=0.26 has it, and trl 1.16 is what this was tested with",
    "trl.experimental.kto.KTOConfig": "it is trl.KTOConfig",
}

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
    return kind, kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def keyword_fields(module: str, function: str | None = None) -> dict[str, Field]:
    """Return the keyword-only parameters of one of our own functions, or of all of a module, as keys of an option.

    Raises:
        ConfigError: The module has no such function.
    """
    path = Path(__file__).with_name(f"{module}.py")
    first = {"rewards": "completions"}.get(module)  # what makes a function of that module a choice
    public = {
        n.name: n
        for n in parse(path).body
        if isinstance(n, ast.FunctionDef) and (first is None or [a.arg for a in n.args.args][:1] == [first])
    }
    if function is not None and function not in public:
        raise ConfigError(f"runner.{module} has no {function!r}; choose one of {sorted(public)}.")
    return {
        a.arg: Field(partial(_read_type, a.annotation, path), required=default is None)
        for name, node in public.items()
        if function in (None, name)
        for a, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    }


@lru_cache(maxsize=64)
def upstream_fields(target: str) -> dict[str, Field]:
    """Return the fields of an upstream config class, read from its source and its bases' source.

    Args:
        target: Dotted name, for example ``trl.DPOConfig``.

    Raises:
        ConfigError: The installed library has no such class.
    """
    return dict(_fields_of(*locate(target)))


@lru_cache(maxsize=64)
def bases_of(target: str) -> tuple[str, ...]:
    """Return the class name of a config class and of all its bases, nearest first."""
    return tuple(name for name, _, _ in _lineage(*locate(target)))


@lru_cache(maxsize=64)
def locate(target: str) -> tuple[Path, ast.ClassDef]:
    """Find the file and the syntax tree of a class by its dotted name, without importing its package.

    Raises:
        ConfigError: The package is not installed or has no such class; the message names the versions that do.
    """
    package, *parts, name = target.split(".")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{target} cannot be used: the package {package!r} is not installed. pip install {package}")
    module = _module_file(Path(spec.submodule_search_locations[0]).joinpath(*parts))
    found = _find_class(module, name) if module else None
    if found is None:
        from importlib.metadata import version

        hint = HISTORY.get(target, "check the name")
        raise ConfigError(f"The installed {package} {version(package)} has no {target}: {hint}.")
    return found


@lru_cache(maxsize=128)
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a module, which is read once."""
    return ast.parse(path.read_text(encoding="utf-8"))


def _module_file(base: Path) -> Path | None:
    candidates = (base.with_name(base.name + ".py"), base / "__init__.py")
    return next(filter(Path.is_file, candidates), None)


@lru_cache(maxsize=512)
def _find_class(path: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
    """Find a class defined in a module or imported into it, following the imports."""
    tree = parse(path)
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return path, statement
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    module = _imported_file(path, node)
                    if module and module != path and (found := _find_class(module, alias.name)):
                        return found
    return None


def _imported_file(path: Path, node: ast.ImportFrom) -> Path | None:
    parts = node.module.split(".") if node.module else []
    if node.level:
        return _module_file(path.parents[node.level - 1].joinpath(*parts))
    spec = find_spec(parts[0]) if parts[0] in {"trl", "transformers", "peft", "accelerate", "runner"} else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return _module_file(Path(spec.submodule_search_locations[0]).joinpath(*parts[1:]))


def _lineage(path: Path, node: ast.ClassDef) -> Iterator[tuple[str, Path, ast.ClassDef]]:
    yield node.name, path, node
    for base in node.bases:
        if found := _find_class(path, ast.unparse(base).split(".")[-1]):
            yield from _lineage(*found)


@lru_cache(maxsize=256)
def _fields_of(path: Path, node: ast.ClassDef) -> tuple[tuple[str, Field], ...]:
    return tuple(_read_fields(path, node))


def _read_fields(path: Path, node: ast.ClassDef) -> Iterator[tuple[str, Field]]:
    """Yield fields in the order of ``dataclasses.fields``; a class with its own ``__init__`` gives its parameters."""
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init:
        arguments = init.args.args[1:]
        defaults = [None] * (len(arguments) - len(init.args.defaults)) + init.args.defaults
        for argument, default in zip(arguments, defaults, strict=True):
            yield argument.arg, Field(partial(_read_type, argument.annotation or _type_of(default), path))
        return
    for base in reversed(node.bases):
        if found := _find_class(path, ast.unparse(base).split(".")[-1]):
            yield from _fields_of(*found)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            annotation = ast.unparse(statement.annotation)
            value = ast.unparse(statement.value) if statement.value else ""
            if "ClassVar" not in annotation and "init=False" not in value:
                read = partial(_read_type, statement.annotation, path)
                about = _metadata(statement.value)
                yield statement.target.id, Field(read, doc=about.get("help", ""), choices=about.get("choices", []))


def _metadata(default: ast.expr | None) -> dict[str, Any]:
    """Return what a dataclass field's metadata says in plain values, such as its ``help`` and its ``choices``."""
    found: dict[str, Any] = {}
    for node in ast.walk(default) if default else ():
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant):
                    with suppress(ValueError):
                        found.setdefault(str(key.value), ast.literal_eval(value))
    return found


class _Reader(ast.NodeTransformer):
    """Rewrites an annotation so that it can be evaluated: enums become their values, what we do not know Any."""

    def __init__(self, path: Path):
        self.path = path
        self.names: dict[str, Any] = dict(_TYPING)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self.names:
            found = _find_class(self.path, node.id)
            values = _enum_values(found[1]) if found else ()
            self.names[node.id] = Literal[values] if values else Any
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return ast.copy_location(ast.Name("Any", ast.Load()), node)

    def visit_Tuple(self, node: ast.Tuple) -> ast.expr:
        # accelerate names torch's classes in quotes, as a config cannot: an object of theirs is no value of ours
        kept = [m for m in node.elts if not (isinstance(m, ast.Constant) and isinstance(m.value, str))]
        return ast.Tuple([self.visit(m) for m in kept] or [self.visit(ast.Name("Any", ast.Load()))], ast.Load())

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if ast.unparse(node.value) == "Literal":
            # peft writes patterns among the values, such as 'pissa_niter_[number of iters]'
            return ast.Name("str", ast.Load()) if "_[" in ast.unparse(node.slice) else node
        base = self.visit(node.value)
        if isinstance(base, ast.Name) and self.names.get(base.id) is Any:
            return base
        return ast.Subscript(base, self.visit(node.slice), node.ctx)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        # "SchedulerType | str": upstream turns the string into the enum, so only its values are right
        members = [self.visit(m) for m in _union_members(node)]
        enums = [m for m in members if isinstance(m, ast.Name) and _is_literal(self.names.get(m.id))]
        kept = [m for m in members if not (enums and isinstance(m, ast.Name) and m.id == "str")]
        return ast.Subscript(ast.Name("Union", ast.Load()), ast.Tuple(kept, ast.Load()), ast.Load())


def _read_type(annotation: ast.expr | None, path: Path) -> tuple[Any, str]:
    """Return an annotation's type for checking, and its text for messages."""
    if annotation is None:
        return Any, "any value"
    quoted = isinstance(annotation, ast.Constant) and isinstance(annotation.value, str)
    return _evaluate(annotation.value if quoted else ast.unparse(annotation), path)  # type: ignore[attr-defined]


@lru_cache(maxsize=1024)
def _evaluate(text: str, path: Path) -> tuple[Any, str]:
    reader = _Reader(path)
    expression = ast.fix_missing_locations(ast.Expression(reader.visit(ast.parse(text, mode="eval").body)))
    # builtins are emptied: the text is a type annotation of an installed library, never of a config
    value = eval(compile(expression, str(path), "eval"), {"__builtins__": {}}, reader.names)
    for name, known in reader.names.items():
        if _is_literal(known) and name in text:
            text = " | ".join(str(v) for v in known.__args__) + (" | None" if "None" in text else "")
    return _own_type(value) if "'torch." in text else (value, text)


def _type_of(default: ast.expr | None) -> ast.expr | None:
    """Return the annotation that an unannotated parameter's default implies."""
    if isinstance(default, ast.Constant) and isinstance(default.value, bool | int | float | str):
        return ast.Name(type(default.value).__name__, ast.Load())
    return None


def _union_members(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union_members(node.left) + _union_members(node.right)
    return [node]


def _is_literal(value: Any) -> bool:
    return getattr(value, "__origin__", None) is Literal


def _enum_values(node: ast.ClassDef) -> tuple[str, ...]:
    if not any("Enum" in ast.unparse(base) for base in node.bases):
        return ()
    return tuple(
        s.value.value
        for s in node.body
        if isinstance(s, ast.Assign) and isinstance(s.value, ast.Constant) and isinstance(s.value.value, str)
    )
