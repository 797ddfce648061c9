"""What is loaded once for many processes: by the one that they are forked from, before there are any."""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_kept: dict[str, Any] = {}  # what was loaded, by the call that asked for it

logger = logging.getLogger(__name__)


def once(load: Callable[P, T]) -> Callable[P, T]:
    """Let a function give out what ``keep`` has of it to the first call that asks for the same."""

    @functools.wraps(load)
    def given_out(*args: P.args, **options: P.kwargs) -> T:
        if (call := _call(load, args, options)) not in _kept:
            return load(*args, **options)
        logger.info("models.%s was called once for all trials of this sweep", load.__name__)
        return _kept.pop(call)

    return given_out


def keep(load: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Load, and keep it for one call in each process that is forked from here, which may change its copy."""
    found = load(*args, **options)
    _kept[_call(load, args, options)] = found
    return found


def _call(load: Any, args: Any, options: Any) -> str:
    bound = inspect.signature(load).bind(*args, **options)
    bound.apply_defaults()
    return f"{load.__qualname__} {bound.arguments}"
