"""``python -m runner.check``: know before you train.

It takes the overrides of ``python -m runner``, and words of its own:

  check.json=PATH              write everything as JSON, too
  check.reach=false            do not ask the hub; what is not on this machine is passed over, and said
  check.probe=true             one optimizer step on the longest rows and one evaluation step, with the weights
  check.policy.NAME=warn|fail  what a finding does; NAME stands before each finding
  --schema                     write a JSON Schema of the config instead, for editors

No weights are read but with check.probe. Exit code 0, or 2 with what has to be corrected.
"""

import difflib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner import compose, findings, lean
from runner.checkup import Check, Passed, say, size, table
from runner.config import changes, find_idle, group_names
from runner.errors import ConfigError, RunStopped
from runner.findings import Finding

READING_ORDER = ("experiment", "trainer", "model", "dataset", "peft", "quantization", "reward")
OPTIONS = {"json": "a path", "reach": "true or false", "probe": "true or false", "policy": "a finding"}


def main() -> None:
    """Check what the command line asks for, print what is found, and leave with 0 or 2."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    words = sys.argv[1:]
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may know fewer characters
    if "--help" in words or "-h" in words:
        say(str(__doc__))
        return
    try:
        if "--schema" in words:
            from runner import editor

            say(json.dumps(editor.json_schema(), indent=2))
            return
        done = check(words)
    except ConfigError as error:
        sys.stderr.write(f"runner.check: {error}\n")
        sys.exit(2)
    except BrokenPipeError:  # what reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(2 if done.failed else 0)


def check(words: Sequence[str]) -> Check:
    """Check a run, printing as it goes.

    Args:
        words: of the command line.

    Raises:
        ConfigError: the config cannot be composed, or has faults: all of them.
    """
    start = time.monotonic()
    options, policies, rest = read_options(words)
    arguments = compose.parse_arguments(rest)
    if arguments.multirun or arguments.cfg or any(word.startswith("resume") for word in rest):
        raise ConfigError("A check looks at one run that has not begun: leave out -m, --cfg and resume=.")
    where = compose.places(arguments)
    done = Check(options, policies, compose.compose(arguments.overrides, **where), arguments.overrides, where)
    notes = _Notes(done)
    logger = logging.getLogger("runner")
    logger.addHandler(notes)
    try:
        run_section(done, "Config", check_config)
        run_section(done, "Reach", check_reach)
        lean.begin(lean.left_out(done.config))
        from runner import exhibit, prospect  # and with them torch

        lean.settle()
        run_section(done, "Data", exhibit.check_data)
        run_section(done, "View", exhibit.check_view)
        run_section(done, "Model", prospect.check_model)
        run_section(done, "Plan", prospect.check_plan)
        run_section(done, "Memory", prospect.check_memory)
        if options.get("probe") == "true":
            run_section(done, "Probe", prospect.probe)
    finally:
        logger.removeHandler(notes)
    faults = sum(policy == "fail" for policy, _ in done.found)
    say(f"\n{faults} to correct, {len(done.found) - faults} to know, in {time.monotonic() - start:.0f} s")
    if path := options.get("json"):
        listed = [{"policy": policy, **asdict(one)} for policy, one in done.found]
        everything = {"resolved": done.config, "findings": listed, **done.facts}
        Path(path).write_text(json.dumps(everything, indent=2, ensure_ascii=False, default=str), encoding="utf-8")
    return done


def read_options(words: Sequence[str]) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Take the words of the check itself out of a command line.

    Returns:
        Its options, the policy of each finding, and the other words.

    Raises:
        ConfigError: One is not known or has a wrong value.
    """
    options: dict[str, str] = {}
    policies, rest, faults = dict(findings.POLICIES), [], []
    for word in words:
        key, _, value = word.partition("=")
        name = key.removeprefix("check.")
        if not word.startswith("check."):
            rest.append(word)
        elif name.startswith("policy.") and name.removeprefix("policy.") not in policies:
            faults.append(f"{key} does not exist: {nearest(name.removeprefix('policy.'), list(policies))}")
        elif name.startswith("policy.") and value not in ("warn", "fail"):
            faults.append(f"{key} takes warn or fail, found {value!r}.")
        elif name.startswith("policy."):
            policies[name.removeprefix("policy.")] = value
        elif name not in OPTIONS or name == "policy":
            faults.append(f"{key} does not exist: {nearest(name, list(OPTIONS))}")
        elif not value or (OPTIONS[name] == "true or false" and value not in ("true", "false")):
            faults.append(f"{key} takes {OPTIONS[name]}, found {value!r}.")
        elif name == "json" and not Path(value).absolute().parent.is_dir():
            faults.append(f"check.json={value} cannot be written: there is no folder {Path(value).parent}.")
        else:
            options[name] = value
    if faults:
        raise ConfigError(" ".join(faults))
    return options, policies, rest


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a hint at the nearest of some words, or a list of all."""
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"it can be {', '.join(known)}."


def run_section(done: Check, title: str, section: Callable[[Check], dict[str, Any]]) -> None:
    """Print a section; a fault in it is a finding, and what depends on it is passed over."""
    say(f"\n{title}")
    try:
        done.facts[title.lower()] = section(done)
    except Passed as why:
        say(f"  not checked: {why}")
        done.facts[title.lower()] = {"not checked": str(why)}
    except (ConfigError, RunStopped) as error:
        done.add(Finding(title.lower(), str(error)))


class _Notes(logging.Handler):
    """Turns warnings of our modules into findings, but for those of the token audit, which are findings already."""

    def __init__(self, done: Check) -> None:
        super().__init__(logging.WARNING)
        self.done = done

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "runner.tokens":
            self.done.add(Finding("note", record.getMessage()))


# ---------------------------------------------------------------- sections


def check_config(done: Check) -> dict[str, Any]:
    """Say what was chosen, what differs from the option files, and what has no effect."""
    made = done.composed.choices
    order = dict.fromkeys([*READING_ORDER, *sorted(made)])
    choices = {group: made[group] for group in order if made.get(group) not in (None, "None", "null")}
    say("  " + " ".join(f"{group}={option}" for group, option in choices.items()))
    changed = changes(_files(done), done.config, "-")
    changed = {key: pair for key, pair in changed.items() if key not in ("output_dir", "trainer.seed")}
    table({key: f"{value!r}, {f'in the option files {file!r}' if file != '-' else 'not in the option files'}"
           for key, (file, value) in changed.items()})  # fmt: skip
    if not changed:
        say("  every key as in the option files")
    touched = {*changed} | {text.lstrip("+~").partition("=")[0] for text in done.overrides}
    done.add(*(Finding("no_effect", text) for text in find_idle(done.config, touched)))
    return {
        "choices": choices,
        "changed": {key: {"value": value, "files": file} for key, (file, value) in changed.items()},
    }


def _files(done: Check) -> dict[str, Any]:
    """Compose the chosen options alone."""
    choices = {g: o for g, o in done.composed.choices.items() if g != "experiment" and o not in ("None", "null")}
    main = [f"{group}={option}" for group, option in choices.items() if group in group_names() or "value_" in group]
    known = compose.compose(main, check=False, **done.where).choices
    nested = [f"{'' if group in known else '+'}{group}={option}" for group, option in choices.items() if "@" in group]
    main += [text for text in nested if "value_" not in text]
    return compose.compose(main, check=False, **done.where).config


def check_reach(done: Check) -> dict[str, Any]:
    """Find what the config names, and a place to write to."""
    from runner import engines, launch, reach

    if done.options.get("reach") == "false":
        from huggingface_hub import constants

        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        say("  the hub is not asked (check.reach=false)")
    places, faults = reach.find_places(done.config, ask=done.options.get("reach") != "false")
    table({place.key: f"{place.name}  {place.state}  {place.about}".rstrip() for place in places})
    done.absent = {place.key for place in places if place.state == "not asked"}
    done.absent |= {fault.partition("=")[0] for fault in faults}
    done.add(*(Finding("reach", fault) for fault in faults))
    node, trainer = done.config["launch"], done.config["trainer"]
    lacking = engines.find_missing(node, processes=launch.processes(node), use_cpu=bool(trainer.get("use_cpu")))
    done.add(*(Finding("launch", fault) for fault in lacking + engines.vllm_faults(trainer)))
    done.add(*(Finding("trackers", fault) for fault in reach.tracker_faults(done.config["trainer"])))
    free = reach.writable(done.composed.run_dir)
    say(f"  output_dir  {done.composed.run_dir}, {size(free)} free")
    return {"places": [asdict(place) for place in places], "free_bytes": free}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
