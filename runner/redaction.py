"""The scrubbing of secrets from everything that is written."""

import logging
import os
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"

_WORDS = r"passw(?:or)?d|passphrase|secret|credential|token|key"
_VARIABLE = re.compile(r"passw(or)?d|passphrase|secret|credential|apikey|token$|(^|_)(token|key|pat)(_|$)", re.I)
_NAME = re.compile(
    r"(passw(or)?d|passphrase|secret|credential)s?\d*([_-]|$)|token$"
    r"|(api|access|secret|private|auth|account|service|encryption|signing|license|ssh|subscription)[_-]?keys?$",
    re.I,
)
_SPECIAL = re.compile(  # words of a text, not of a lock
    r"(^|[._-])(pad|eos|bos|unk|mask|sep|cls|image|video|audio|stop|start|end|eot|eom|new|next|first|last|max|min|num"
    r"|per|special|boundary|separator|think|thinking|answer|input|output|prompt)[_-]?token$",
    re.I,
)
_HARMLESS = re.compile(r"(none|null|true|false|str|int|\?\?\?|\*\*\*|\d+\.\d*(e-?\d+)?|\$\{.*)?", re.I | re.S)
_MARKUP = re.compile(r"[<\[{#(|]")  # how a word of a text begins, where a name ends in "token"
_PAIR = re.compile(
    rf"(?P<word>(?:{_WORDS})[\w-]{{0,40}})(?P<mid>[\"']?\s*(?::=|[:=])\s*)"
    r"(?P<value>\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'|[^\s\"',;&|)\]}]+)",
    re.I,
)
_NAME_BEFORE = re.compile(r"[\w.-]*$")
_OPTION = re.compile(r"--?([\w.-]+)")
_OVERRIDE = re.compile(r"[-+~]*[\w.@/-]+")
_SHAPES = re.compile(  # what a token looks like wherever it stands
    r"\bhf_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bglpat-[\w-]{20,}|\bxox[a-z]-[\w-]{10,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.S,
)
_BEARER = re.compile(r"\b(Bearer\s+)[\w.~+/=-]{8,}", re.I)
_LOGIN = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,20}://)[^\s/@\"'<>]+@", re.I)
_QUERY = re.compile(
    r"(?P<name>[?&](?:[\w-]*(?:sig|signature|token|key|secret|password|credential))=)[^\s&#\"'<>]+", re.I
)


def scrub(value: Any) -> Any:
    """Return text, or a tree of dicts and lists, without the secrets in it.

    Hidden are values of environment variables, and of ``name=value`` and ``name: value`` pairs, whose names
    speak of tokens, keys, passwords or secrets; tokens with a known form (``hf_...``); credentials in URLs.
    A special token (``pad_token``, ``eos_token``) is none of these. In running text the value of a pair ends
    at a space, in a list (a command line) with its item.
    """
    return _scrub(value, _secrets_of_environment())


class Scrubbing(logging.Filter):
    """Take the secrets out of every record of a handler; attach it to handlers, not to loggers."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Scrub message and traceback; keep every record."""
        record.msg, record.args = scrub(record.getMessage()), None
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = scrub("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return True


def _secrets_of_environment() -> list[str]:
    """Return the values of environment variables that sound secret, the longest first."""
    values = {value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= 6}
    # A name may also hold a switch, a count or the path of a key file.
    kept = (value for value in values if not _HARMLESS.fullmatch(value) and not os.path.lexists(value))
    return sorted(kept, key=len, reverse=True)


def _scrub(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        return _scrub_text(value, secrets)
    if isinstance(value, Mapping):
        return {
            _scrub(key, secrets): HIDDEN if _is_secret(str(key), item) else _scrub(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return _scrub_list(value, secrets)
    return value


def _scrub_list(values: Sequence[Any], secrets: list[str]) -> list[Any]:
    """Scrub a list, which may be a command line: ``name=value with spaces``, ``--token VALUE``."""
    items = [_scrub(item, secrets) for item in values]
    for position, word in enumerate(values):
        if not isinstance(word, str):
            continue
        name, equals, value = word.partition("=")
        option = _OPTION.fullmatch(word)
        if equals and _OVERRIDE.fullmatch(name) and _is_secret(name, value):
            items[position] = f"{name}={HIDDEN}"
        elif option and position + 1 < len(values) and _is_secret(option[1], values[position + 1]):
            items[position + 1] = HIDDEN
    return items


def _scrub_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _SHAPES.sub(HIDDEN, text)
    text = _LOGIN.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _QUERY.sub(rf"\g<name>{HIDDEN}", text)
    text = _BEARER.sub(rf"\g<1>{HIDDEN}", text)
    return _PAIR.sub(_hide_pair, text)


def _hide_pair(match: re.Match[str]) -> str:
    before = match.string[max(0, match.start() - 40) : match.start()]
    stem = _NAME_BEFORE.search(before)
    name = (stem[0] if stem else "") + match["word"]
    quote = match["value"][0] if match["value"][0] in "\"'" else ""
    if not _is_secret(name, match["value"].strip("\"'")):
        return match[0]
    return f"{match['word']}{match['mid']}{quote}{HIDDEN}{quote}"


def _is_secret(name: str, value: Any) -> bool:
    if value is None or isinstance(value, bool | float | Mapping | list | tuple):
        return False
    last = name.rsplit(".", 1)[-1]
    sounds_secret = (_VARIABLE if last.isupper() else _NAME).search(last)
    if not sounds_secret or _SPECIAL.search(last) or _HARMLESS.fullmatch(str(value)):
        return False
    return not (last.lower().endswith("token") and _MARKUP.match(str(value)))
