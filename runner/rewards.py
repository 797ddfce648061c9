"""Rewards: completions in, floats out. A reward function is any public one here that takes ``completions``.

A completion is a text, or messages (their contents count). Parameters after ``completions`` are columns of the
dataset, one value a completion; keyword-only parameters are options, keys of the ``reward`` group; everything
else that the trainer hands over lands in ``**kwargs``. ``None`` in a result means that the reward does not apply
to that row: the sum goes without it.
"""

import importlib
import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from runner.errors import ConfigError, RunStopped

Completion = str | list[dict[str, Any]]

# What TRL hands to every reward function beside the columns, and the columns that it keeps to itself.
FROM_TRAINER = {"completions", "prompts", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
WITHHELD = {"prompt", "completion"}

_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_MARK = re.compile(r"####|\b(?:answer|result) is\b:?|\banswer:", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?](?:\s|$)")
_WRAPPING = " \t\n.!*_`'\"$"


def exact_match(
    completions: Sequence[Completion], answer: Sequence[str | int | float | list[str]], **kwargs: Any
) -> list[float | None]:
    r"""Give 1 for a completion whose final answer is the row's ``answer``, else 0.

    The final answer is what the last ``\boxed{}`` holds, or what follows the last ``####``, ``answer is`` or
    ``answer:``, to the end of that sentence; without such a mark it is the whole completion. A numeric answer is
    compared with the last number of it alone, by value (``1,200`` is ``1200.0``): naming many numbers does not
    help. A text answer must be all of it, or the whole last line, but for case, spaces, quotes and a final stop.
    A list of answers accepts each; null gives null.
    """
    return [
        None if accepted is None else float(_is_right(_text(completion), accepted))
        for completion, accepted in zip(completions, answer, strict=True)
    ]


def unique_chars(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    """Count the distinct characters of each completion: an easy reward to watch grow."""
    return [float(len(set(_text(completion)))) for completion in completions]


def length(
    completions: Sequence[Completion], *, unit: str = "characters", target: int | None = None, **kwargs: Any
) -> list[float]:
    """Give the length of each completion, or minus its distance to a target.

    Args:
        completions: what to score.
        unit: ``characters`` or ``words`` (what spaces separate).
        target: the best length, with reward 0; null rewards the longest.
        **kwargs: not used.
    """
    if unit not in ("characters", "words"):
        raise ConfigError(f"reward.unit={unit} does not exist. Choose characters or words.")
    texts = [_text(completion) for completion in completions]
    sizes = [len(text) if unit == "characters" else len(text.split()) for text in texts]
    return [float(size if target is None else -abs(size - target)) for size in sizes]


def format(completions: Sequence[Completion], *, pattern: str, whole: bool = True, **kwargs: Any) -> list[float]:
    """Give 1 for a completion that matches a regular expression, else 0.

    Args:
        completions: what to score.
        pattern: in Python's syntax; ``.`` also matches line breaks.
        whole: match the whole completion, or find the pattern anywhere in it.
        **kwargs: not used.

    Source: https://docs.python.org/3/library/re.html
    """
    try:
        expression = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(
            f"reward.pattern={pattern!r} is no regular expression: {error}. Within YAML put it in single quotes."
        ) from error
    match = expression.fullmatch if whole else expression.search
    return [float(match(_text(completion)) is not None) for completion in completions]


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    return "\n".join(message.get("content") or "" for message in completion)


def _is_right(text: str, accepted: Any) -> bool:
    if isinstance(accepted, list | tuple):
        return any(_is_right(text, one) for one in accepted)
    if boxed := _BOXED.findall(text):
        text = boxed[-1]
    marks = list(_MARK.finditer(text))
    final = text[marks[-1].end() :].strip() if marks else text
    sentence = _SENTENCE_END.split(final)[0] if marks else final
    wanted = _number(str(accepted))
    if wanted is not None:
        found = _NUMBER.findall(sentence.replace("−", "-"))  # noqa: RUF001 - the minus sign that models write
        return bool(found) and Decimal(found[-1].replace(",", "")) == wanted
    last_line = final.rstrip().rpartition("\n")[2]
    return _plain(accepted) in {_plain(final), _plain(sentence), _plain(last_line)}


def _number(text: str) -> Decimal | None:
    match = _NUMBER.fullmatch(text.strip(" $%"))
    return Decimal(match[0].replace(",", "")) if match else None


def _plain(text: Any) -> str:
    return " ".join(str(text).strip(_WRAPPING).casefold().split())


# --- from a reward node of the config to what TRL's trainers take


@dataclass
class Rewards:
    """What an online trainer optimises: one entry a reward, in order.

    Attributes:
        functions: ``Scorer`` or model.
        weights: in the sum.
        tokenizers: of the models; None for functions.
        untrained: models whose score head is random.
    """

    functions: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    tokenizers: list[Any] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)


class Scorer:
    """A reward function with its options, called as TRL calls one. Its ``__name__`` names the metrics.

    Raises:
        RunStopped: when called, if the function raises, or gives anything but one finite number or None a
            completion. The message holds the prompt and the completion.
    """

    def __init__(self, function: Callable[..., Any], *, name: str, options: dict[str, Any]) -> None:
        self.function, self.options = function, options
        self.__name__ = name
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.takes = {p.name for p in parameters}

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """Score completions; ``columns`` are lists with a value for each, or the trainer's own objects."""
        given = {"completions": completions, **columns}
        try:
            values = list(self._call(given))
        except Exception as error:  # foreign code: whatever it raises is told, with its completion
            raise self._blame(error, given) from error
        if len(values) != len(completions):
            found = f"it gave {len(values)} values for {len(completions)} completions, the first of them here"
            raise self._stop(found, given, 0)
        return [None if value is None else self._finite(value, given, place) for place, value in enumerate(values)]

    def _call(self, given: dict[str, Any]) -> Any:
        kept = given if self.takes_all else {name: value for name, value in given.items() if name in self.takes}
        return self.function(**(kept | self.options))

    def _finite(self, value: Any, given: dict[str, Any], position: int) -> float:
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self._stop(f"it gave {value!r}, where a finite number or None is allowed", given, position)
        return number

    def _blame(self, error: Exception, given: dict[str, Any]) -> RunStopped:
        """Call the function again for every completion alone, to find the one that it fails on."""
        count = len(given["completions"])
        raised = f"it raised {type(error).__name__}: {error}"
        for position in range(count):
            alone = {
                name: [value[position]] if isinstance(value, list) and len(value) == count else value
                for name, value in given.items()
            }
            try:
                self._call(alone)
            except Exception:  # noqa: BLE001 - as above, and told with the first error
                return self._stop(raised, given, position)
        return self._stop(f"{raised}, though for no completion of the batch alone; the first is", given, 0)

    def _stop(self, found: str, given: dict[str, Any], position: int) -> RunStopped:
        prompts = given.get("prompts") or [None] * len(given["completions"])
        return RunStopped(
            f"The reward {self.__name__} failed: {found}.\n"
            f"prompt: {str(prompts[position])[:2000]!r}\n"
            f"completion: {str(given['completions'][position])[:2000]!r}"
        )


def needed_columns(function: Callable[..., Any]) -> list[str]:
    """Name the dataset columns without which a reward function cannot be called."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.default is p.empty
        and p.name not in FROM_TRAINER
    ]


def build_rewards(
    node: dict[str, Any],
    *,
    columns: Collection[str],
    load_model: Callable[[dict[str, Any]], tuple[Any, Any]],
    allowed: Collection[str] = (),
) -> Rewards:
    """Build the rewards that a reward node names.

    Args:
        node: ``function`` and its options; or ``model``, a model node; or ``terms``, reward nodes by name, which
            are summed. Each may have a ``weight``; that of a sum multiplies those of its terms.
        columns: the dataset's columns.
        load_model: gives the sequence-classification model of a model node, and its tokenizer.
        allowed: dotted names of a person's own functions that may be imported.

    Raises:
        ConfigError: nothing or too much is named; an option or a column is missing or unknown; a function is
            not allowed or not found; a model has more than one label.
    """
    if clash := sorted(FROM_TRAINER & set(columns)):
        raise ConfigError(
            f"The dataset's columns {clash} cannot be handed to rewards: the trainer uses these names itself. "
            f"Rename them, for example dataset.rename='{{{clash[0]}: my_{clash[0]}}}'."
        )
    built = Rewards()
    for path, leaf, weight in _leaves(node, "reward", 1.0):
        name = path.removeprefix("reward").removeprefix(".").replace("terms.", "")
        if leaf.get("model"):
            model, tokenizer = load_model(leaf["model"])
            built.functions.append(_frozen(model, path))
        else:
            tokenizer = None
            built.functions.append(_scorer(leaf, name, path, set(columns), allowed))
        built.weights.append(weight)
        built.tokenizers.append(tokenizer)
    return built


def _leaves(node: dict[str, Any], path: str, weight: float) -> Iterator[tuple[str, dict[str, Any], float]]:
    kinds = [kind for kind in ("function", "model", "terms") if node.get(kind)]
    if len(kinds) != 1:
        found = f"names {' and '.join(kinds)}" if kinds else "names nothing to score with"
        raise ConfigError(
            f"{path} {found}; it needs one of function, model and terms. Type reward=exact_match, or for a model "
            f"reward=model model@reward.model=pythia160m, or for a sum reward=sum."
        )
    weight *= node.get("weight", 1.0)
    if kinds == ["terms"]:
        for name, term in node["terms"].items():
            yield from _leaves(term or {}, f"{path}.terms.{name}", weight)
    else:
        yield path, node, weight


def _frozen(model: Any, path: str) -> Any:
    labels = model.config.num_labels
    if labels != 1:
        raise ConfigError(
            f"{path}.model cannot be a reward: it has {labels} labels, where one score is needed. Choose a reward "
            "model, for example one that trainer=reward made."
        )
    model.requires_grad_(False)
    return model.eval()


def _scorer(node: dict[str, Any], name: str, path: str, columns: set[str], allowed: Collection[str]) -> Scorer:
    function = _find(node["function"], path, allowed)
    options = {key: value for key, value in node.items() if key not in ("function", "weight", "model", "terms")}
    parameters = inspect.signature(function).parameters
    own = [p for p in parameters if p not in FROM_TRAINER and parameters[p].kind is not inspect.Parameter.VAR_KEYWORD]
    if unknown := sorted(set(options) - set(own)):
        raise ConfigError(f"{path}.{unknown[0]} does not exist: {node['function']} has the options {own}.")
    seen = columns - WITHHELD
    given = seen | options.keys()
    missing = [p for p in own if p not in given and parameters[p].default is inspect.Parameter.empty]
    columns_missing = [p for p in missing if p in needed_columns(function)]
    if columns_missing:
        raise ConfigError(
            f"{path}.function={node['function']} cannot score this dataset: it needs {columns_missing}, and beside "
            f"prompts the rows have {sorted(seen)}. Choose a dataset with {columns_missing}, for example "
            f"dataset=gsm8k, rename a column (dataset.rename='{{theirs: {columns_missing[0]}}}'), or choose "
            "another reward, for example reward=unique_chars."
        )
    if missing:
        raise ConfigError(f"{path}.function={node['function']} needs the option {path}.{missing[0]}=...")
    if function.__module__ == __name__:
        function([], **{p: [] for p in needed_columns(function)}, **options)  # checks the options
    return Scorer(function, name=name or function.__name__, options=options)


def _find(name: str, path: str, allowed: Collection[str]) -> Callable[..., Any]:
    if "." not in name:
        functions = {n: f for n, f in globals().items() if inspect.isfunction(f)}
        ours = {n: f for n, f in functions.items() if "completions" in inspect.signature(f).parameters}
        if name not in ours:
            raise ConfigError(
                f"{path}.function={name} does not exist. Choose one of {sorted(ours)}, or type a function of your "
                "own with its module, as my_module.my_function."
            )
        return ours[name]
    if name not in allowed:
        raise ConfigError(
            f"{path}.function={name} is code of your own, which a config alone cannot run. If you trust it, type "
            f"allow_code=[{name}] on the command line."
        )
    module, _, attribute = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{path}.function={name} cannot be imported: {error}. Start in the folder that holds "
            f"{module.partition('.')[0]}, or install it, and check the name."
        ) from error
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise ConfigError(f"{path}.function={name} is no plain function: write it with def, not async.")
    return function
