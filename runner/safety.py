"""A recipe from a stranger cannot run code: what a config may name is refused here, before anything acts on it.

Hydra's blocklist is no boundary (hydra-core 1.3.8 says so itself), and Hydra's callbacks and logging handlers run
before the task function; so the composed but unresolved config is searched first.
"""

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

SPECIAL = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
TARGETS_AT = {"trainer._target_", "peft._target_", "quantization._target_"}
HYDRA_TARGETS = {
    "hydra.launcher._target_": re.compile(
        r"hydra\._internal\.core_plugins\.basic_launcher\.BasicLauncher"
        r"|hydra_plugins\.hydra_joblib_launcher\.joblib_launcher\.JoblibLauncher"
        r"|hydra_plugins\.hydra_ray_launcher\.ray_launcher\.RayLauncher"
        r"|hydra_plugins\.hydra_submitit_launcher\.submitit_launcher\.(Local|Slurm)Launcher"
    ),
    "hydra.sweeper._target_": re.compile(r"hydra_plugins\.runner_sweeper\.RunnerSweeper"),
}
LOGGING_CLASS = re.compile(r"logging\.(StreamHandler|FileHandler|NullHandler|Formatter)|colorlog\.ColoredFormatter")
LOG_FILE = "${hydra.runtime.output_dir}/${hydra.job.name}.log"
JOB_FOLDER = "${hydra.sweep.dir}/.submitit/%j"
# What Hydra acts on itself: an interpolation there could bring in what was read, harmless, at another place.
ACTED_ON = ("hydra.job_logging", "hydra.hydra_logging", "hydra.job.env_set", "hydra.launcher", "hydra.sweeper",
            "hydra.callbacks")  # fmt: skip
LAUNCHER_CODE = {"setup", "additional_parameters", "runtime_env", "address", "_temp_dir", "_system_config"}
RESOLVERS = {"hydra", "now", "oc.env", "oc.select", "python_version"}
READABLE_ENV = {"USER", "HOME", "HOSTNAME", "SCRATCH", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME",
                "CUDA_VISIBLE_DEVICES"}  # fmt: skip
SETTABLE_ENV = {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM",
                "HF_HUB_OFFLINE", "WANDB_PROJECT", "WANDB_MODE"}  # fmt: skip
# Keys that let the author of a model or a recipe run code, wherever they stand, and why.
RUN_CODE = {
    "allow_code": "it lets functions of your own run",
    "trust_remote_code": "it runs the model author's code",
    "allow_pickle": "pickled weights are a program",
    "allow_all_kernels": "it runs compiled code from the hub",
    "custom_generate": "it runs code from the hub",
    "auto_mapping": "it names a module that is imported with the adapter",
}
# Where Hydra writes and what it reads: only the options that come with the runner say so.
PLACES = {
    "hydra.run.dir": "${output_dir}",
    "hydra.sweep.dir": "outputs/sweeps/${now:%Y-%m-%d}/${now:%H-%M-%S}",
    "hydra.sweep.subdir": "${hydra:job.num}",
    "hydra.output_subdir": ".hydra",
    "hydra.searchpath": [],
    "hydra.job.name": "runner",
    "hydra.job.chdir": False,
    "hydra.launcher.submitit_folder": JOB_FOLDER,
}


def find_dangers(config: dict[str, Any], typed: set[str]) -> list[str]:
    """Return everything in an unresolved config that could run code or read secrets, one sentence each.

    Args:
        config: The composed config, Hydra's node included, interpolations unresolved.
        typed: Paths of the keys that the person typed on the command line.
    """
    found: list[str] = []
    for path, key, value in _walk(config):
        if key in SPECIAL:
            found += _target_danger(path, key, value)
        if isinstance(value, str):
            found += _interpolation_danger(path, value)
        starts = path == "hydra.sweeper.params" and not any(key.startswith(path) for key in typed)
        if value and (starts or path == "hydra.mode"):
            found.append(f"{path} is refused: a sweep is started on the command line, with -m.")
        if path.startswith("hydra.launcher"):
            found += _launcher_danger(path, key, value, typed)
        if path.startswith(("hydra.job_logging.", "hydra.hydra_logging.")):
            found += _logging_danger(path, key, value)
        if path.startswith("hydra.job.env_set.") and key not in SETTABLE_ENV:
            found.append(f"{path} is refused: a config may set only {sorted(SETTABLE_ENV)}.")
        if key in RUN_CODE and value and path not in typed:
            found.append(
                f"{path} is refused from a file: {RUN_CODE[key]}. Type {path}={as_typed(value)} if you trust it."
            )
        if path in PLACES and value != PLACES[path] and path not in typed:
            found.append(f"{path}={value!r} is refused from a file: type it, or output_dir=...")
    if config.get("hydra", {}).get("callbacks"):
        found.append("hydra.callbacks is refused: a callback runs code before the config is checked.")
    return found


def find_escape(output_dir: str, typed: set[str]) -> list[str]:
    """Return what is wrong with a resolved ``output_dir`` that was not typed: a recipe writes below ``outputs``."""
    path = PurePath(output_dir)
    if "output_dir" in typed or (path.parts[:1] == ("outputs",) and ".." not in path.parts):
        return []
    return [f"output_dir={output_dir} is refused from a file: it is not below outputs/. Type output_dir=... yourself."]


def as_typed(value: Any) -> str:
    """Return a value as it is typed."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value).lower()


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield (path, key, value) for everything in nested dicts and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        inner = f"{path}.{key}" if path else str(key)
        yield inner, str(key), value
        yield from _walk(value, inner)


def _target_danger(path: str, key: str, value: Any) -> list[str]:
    if path in TARGETS_AT and "$" not in str(value):
        return []  # what it names is checked against the allowlist of runner.config
    if path in HYDRA_TARGETS and HYDRA_TARGETS[path].fullmatch(str(value)):
        return []
    return [f"{path}={value!r} is refused: only the root of {sorted(t.split('.')[0] for t in TARGETS_AT)} has a {key}."]


def _interpolation_danger(path: str, value: str) -> list[str]:
    inside_hydra = path in {"hydra", "hydra.job"} or path.startswith(ACTED_ON)
    if "${" in value and value not in (LOG_FILE, JOB_FOLDER) and (inside_hydra or re.search(r"\$\{[^}:]*\$", value)):
        return [f"{path}={value!r} is refused: no interpolation may stand here, or choose a resolver."]
    for resolver, argument in re.findall(r"\$\{\s*([\w.]+)\s*:(?=([^},]*))", value):  # and those in an argument
        if resolver not in RESOLVERS:
            return [f"{path}={value!r} is refused: the resolver {resolver!r} is not one of {sorted(RESOLVERS)}."]
        if resolver == "oc.env" and argument.strip() not in READABLE_ENV:
            return [f"{path}={value!r} is refused: a config may read only {sorted(READABLE_ENV)} from the environment."]
    return []


def _launcher_danger(path: str, key: str, value: Any, typed: set[str]) -> list[str]:
    local = HYDRA_TARGETS["hydra.launcher._target_"].pattern.partition("|")[0]
    if key == "_target_" and "hydra/launcher" not in typed and not re.fullmatch(local, str(value)):
        return ["hydra/launcher is refused from a file: where trials run is typed. Type hydra/launcher=..."]
    if key in LAUNCHER_CODE and value and not any(path == t or path.startswith(f"{t}.") for t in typed):
        why = "it reaches a shell or another cluster"
        return [f"{path} is refused from a file: {why}. Type {path}=... if you trust it."]
    if isinstance(value, str) and "\n" in value:
        return [f"{path}={value!r} is refused: what a scheduler is told is one line."]
    return []


def _logging_danger(path: str, key: str, value: Any) -> list[str]:
    if key in {"class", "()"} and not LOGGING_CLASS.fullmatch(str(value)):
        return [f"{path}={value!r} is refused: logging may use only Hydra's own handlers."]
    if key == "filename" and value != LOG_FILE:
        return [f"{path}={value!r} is refused: the log belongs to the run directory."]
    if key == "factory" or (str(value).startswith("ext://") and value not in {"ext://sys.stdout", "ext://sys.stderr"}):
        return [f"{path}={value!r} is refused: logging may use only Hydra's own handlers."]
    return []
