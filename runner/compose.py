"""From what a person typed to a checked config: Hydra composes, this module makes its answers kind."""

import difflib
import itertools
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config import CONF, find_faults, group_names, option_names
from runner.errors import ConfigError
from runner.safety import find_dangers, find_escape


@dataclass(frozen=True)
class Composed:
    """A checked config and how it came about."""

    config: dict[str, Any]  # resolved, without Hydra's own node
    choices: dict[str, str]  # group -> option
    run_dir: Path  # where Hydra would put the run; not made yet
    environment: dict[str, str]  # what hydra.job.env_set says


def parse_arguments(argv: list[str]) -> Namespace:
    """Read the command line with Hydra's own parser; overrides may stand on both sides of an option."""
    from hydra._internal.utils import get_args_parser

    arguments, rest = get_args_parser().parse_known_args(argv)
    if arguments.config_path or arguments.experimental_rerun:
        raise ConfigError(
            "--config-path and --experimental-rerun cannot be used: add options with --config-dir=FOLDER."
        )
    wrong = [text for text in rest if text.startswith("-") or "=" not in text]
    if wrong:
        raise ConfigError(f"Cannot read {' '.join(wrong)}: keys are written key=value; options are listed by --help.")
    arguments.overrides += rest
    return arguments


def places(arguments: Namespace) -> dict[str, Any]:
    """Return where a parsed command line has its options from, as ``compose`` takes it."""
    return {"config_dir": arguments.config_dir, "config_name": arguments.config_name or "config"}


def command(words: list[str], config_dir: str | None = None, config_name: str = "config") -> list[str]:
    """Return the words of a command, with where it has its options from."""
    options = {"--config-dir": config_dir, "--config-name": config_name if config_name != "config" else None}
    return ["python", "-m", "runner", *(f"{name}={value}" for name, value in options.items() if value), *words]


def searchpath(*folders: str | Path) -> str:
    """Return the override that lets Hydra find a person's own options, whatever their folders are called.

    Raises:
        ConfigError: There is no such folder; Hydra would only warn.
    """
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        raise ConfigError(
            f"--config-dir={missing[0]} cannot be used: there is no such folder. Type one that holds groups, such as "
            "model/ or experiment/."
        )
    urls = ",".join(quoted(f"file://{Path(folder).resolve()}") for folder in folders)
    return f"hydra.searchpath=[{urls}]"


def quoted(text: object) -> str:
    """Return a text as Hydra's grammar takes it, whatever is in it."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(str(text), Quote.single).with_quotes()


def rewrite_overrides(overrides: list[str]) -> list[str]:
    """Let any existing field be set without ``+``: ``trainer.warmup_steps=10`` becomes ``++trainer.warmup_steps=10``.

    Whether the field exists is checked on the composed config, where recipes are checked too.

    Raises:
        ConfigError: An override cannot be parsed, or chooses an option that does not exist.
    """
    from hydra.core.override_parser.types import OverrideType

    overrides = [_readable(text) for text in overrides]
    rewritten = []
    for text, parsed in zip(overrides, parse(overrides), strict=True):
        plain = parsed.type == OverrideType.CHANGE and parsed.package is None
        is_group = parsed.key_or_group in group_names() or "/" in parsed.key_or_group
        if parsed.key_or_group in group_names() and parsed.type == OverrideType.CHANGE and parsed.value() is None:
            none = "none" in option_names(parsed.key_or_group)  # null is no word of Hydra's for it
            text = f"{parsed.get_key_element()}=none" if none else f"~{parsed.get_key_element()}"
        inside_hydra = parsed.key_or_group.startswith("hydra.") and "env_set" not in parsed.key_or_group
        rewritten.append("++" + text if plain and not is_group and not inside_hydra else text)
    return rewritten


def compose(
    overrides: list[str], *, config_dir: str | None = None, config_name: str = "config", check: bool = True
) -> Composed:
    """Compose and check one config; nothing is imported that it names, and nothing is written.

    Args:
        overrides: As typed, without sweeps.
        config_dir: A folder of the person's own options and recipes (``--config-dir``).
        config_name: The primary config (``--config-name``).
        check: Whether keys and values are checked; dangers always are.

    Raises:
        ConfigError: All faults of the config, at once.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf, open_dict

    arguments = rewrite_overrides(overrides)
    if config_dir:
        arguments.append(searchpath(config_dir))
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="runner"), _translated():
        composed = hydra_compose(config_name, arguments, return_hydra_config=True)
        raw: Any = OmegaConf.to_container(composed, resolve=False)
        typed = {str(parsed.key_or_group) for parsed in parse(arguments)}
        if dangers := find_dangers(raw, typed):
            raise ConfigError(_listed(dangers))
        if strange := sorted(raw["hydra"]["sweeper"].keys() - {"_target_", "params"}):  # which Hydra does not look at
            raise ConfigError(_listed([f"hydra.sweeper.{key} does not exist: try search.{key}." for key in strange]))
        HydraConfig.instance().set_config(composed)
        choices = {k: str(v) for k, v in composed.hydra.runtime.choices.items() if not k.startswith("hydra/")}
        run_dir = Path(composed.hydra.run.dir)
        with open_dict(composed):
            del composed["hydra"]
        config: Any = OmegaConf.to_container(composed, resolve=True)
        if escape := find_escape(str(config.get("output_dir")), typed):
            raise ConfigError(_listed(escape))
        if check and (faults := find_faults(config, choices)):
            raise ConfigError(_listed(faults))
    return Composed(config, choices, run_dir, raw["hydra"]["job"]["env_set"])


def read_values(overrides: list[str], *, groups: bool = False) -> dict[str, Any]:
    """Return the values of plain ``key=value`` overrides by dotted key.

    Args:
        overrides: As typed.
        groups: Whether options may be chosen too, which are passed over.

    Raises:
        ConfigError: One cannot be parsed, sweeps, or chooses an option of a group.
    """
    found = {}
    for text, parsed in zip(overrides, parse(overrides), strict=True):
        chooses = parsed.package is not None or parsed.key_or_group in group_names() or "/" in parsed.key_or_group
        if chooses and groups:
            continue
        if parsed.is_sweep_override() or parsed.is_delete() or chooses:
            raise ConfigError(f"{text} cannot be typed here: only single keys can, such as trainer.logging_steps=1.")
        found[parsed.key_or_group] = parsed.value()
    return found


def claim(run_dir: Path) -> Path:
    """Make a new directory for a run; a name that is taken gets a number, so nothing is ever overwritten."""
    if run_dir.name in ("", ".."):
        raise ConfigError(
            f"output_dir={run_dir} is there: a run makes a directory of its own. Type another output_dir=..."
        )
    for number in itertools.count(1):
        candidate = run_dir if number == 1 else run_dir.with_name(f"{run_dir.name}_{number}")
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"output_dir={candidate} cannot be made: {error}. Type another output_dir=...") from error
        return candidate
    raise AssertionError("unreachable")


def _readable(text: str) -> str:
    """Quote a value that Hydra's grammar has no word for: a slice such as ``train[:500]``, or a path in Chinese."""
    key, equals, value = text.partition("=")
    part = r"\w+(\[[^\[\],]*\])?"
    is_slice = "[" in value and re.fullmatch(rf"{part}(\+{part})*", value)
    is_foreign = not value.isascii() and not set(value) & set(",[]{}()'\"")
    return f'{key}="{value}"' if equals and (is_slice or is_foreign) else text


def parse(overrides: list[str]) -> list[Any]:
    """Read overrides with Hydra's own parser.

    Raises:
        ConfigError: All those that cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parsed, faults = [], []
    for text in map(_readable, overrides):
        try:
            parsed += OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            faults.append(
                f"Cannot read {text!r}: {str(error).splitlines()[0]}. Write key=value; quote lists and spaces."
            )
    if faults:
        raise ConfigError(_listed(faults))
    return parsed


@contextmanager
def _translated() -> Iterator[None]:
    """Turn what Hydra raises into one kind message."""
    from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except MissingConfigException as error:
        raise ConfigError(
            _missing_option(error.missing_cfg_file or "", list(error.options or []), str(error))
        ) from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name}, line {mark.line + 1}" if mark else "a config file"
        raise ConfigError(f"{where} is not valid YAML: {getattr(error, 'problem', error)}.") from error
    except (ConfigCompositionException, HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        if unknown := re.search(
            r"Key '(\w+)' (?:is )?not in (?:struct|'\w+')\s+full_key: (\S+)", f"{error}\n{error.__cause__}"
        ):
            raise ConfigError(_unknown_hydra_key(unknown[2], error)) from error
        lines = [line for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line and "use +" not in line]
        raise ConfigError("The config cannot be composed: " + " ".join(lines[:3])) from error


def _missing_option(name: str, options: list[str], message: str) -> str:
    group, _, option = name.rpartition("/")
    options = [o for o in options if not o.startswith("_")]
    if not options:
        return message.splitlines()[0]
    near = difflib.get_close_matches(option, options, 1, 0.4)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    return f"{group}={option} does not exist: {hint}{group} can be {', '.join(sorted(options))}."


def _unknown_hydra_key(path: str, error: Exception) -> str:
    """Say that a key of Hydra's own does not exist, with the nearest beside it that does."""
    from hydra.conf import HydraConf
    from omegaconf import OmegaConf

    parent, _, name = path.rpartition(".")
    known = OmegaConf.select(OmegaConf.create({"hydra": OmegaConf.structured(HydraConf)}), parent)
    node = known or getattr(error.__cause__, "parent_node", None)  # the latter of a plugin's own
    names = [str(key) for key in node or () if key != "_target_"]
    if parent == "hydra.launcher" and not names:
        return f"{path} has no effect without hydra/launcher=... (ray, submitit_slurm, submitit_local or joblib)."
    near = difflib.get_close_matches(name, names, 1, 0.5)
    hint = f"did you mean {parent}.{near[0]} (group hydra)?" if near else f"{parent} has {sorted(names)}."
    return f"{path} does not exist in Hydra's own config: {hint}"


def _listed(faults: list[str]) -> str:
    unique = list(dict.fromkeys(faults))
    return unique[0] if len(unique) == 1 else f"{len(unique)} faults:\n" + "\n".join(f"  - {f}" for f in unique)
