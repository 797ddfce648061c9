"""manifest.json of a run directory: what ran, with what, and how it ended.

It is valid JSON at every moment, also after a kill: it is replaced as a whole.

Fields:
    schema: version of this format; it grows when a field changes its meaning
    status: created, running, resumed, completed, failed, preempted or pruned
    timeline: every status with its time (UTC)
    heartbeat: time at which the process of a running run was alive
    cause: why the run failed, was preempted or pruned
    traceback: of what ended it, its end
    argv: what was typed
    overrides: what of it was for the config
    choices: the option of each group
    no_effect: what was typed and has no effect, with the reason
    resumes: for each time that the run went on: its status before, and the keys and the processes that were changed
    config_sha256: digest of config.yaml
    git: commit, changed files and diff of the repository around the working directory
    versions: of Python and of the libraries that a result hangs on
    packages: versions of all that is installed
    platform: operating system, machine, host
    hardware: device, accelerators, processor, cores, memory, threads
    process: number of the process
    processes: that train together
    chosen: what was chosen for the hardware, because the config leaves it open
    seed: of everything
    determinism: seeds and settings of the training that decide whether it can be repeated
    data: per split: rows read, kept and dropped by reason, files, fingerprint of the canonical rows
    findings: what a person should know of rows and tokens, as python -m runner.check says it
    plan: optimizer steps, tokens, evaluations and checkpoints that were foreseen
    memory: bytes that were foreseen for one process, by part, and their peak
    speed: seconds of an optimizer step, and tokens in a second
    tokens: per split: the audit of what the model reads
    rows: rows to train on
    parameters: of the model
    trainable_parameters: of the model
    upstream_was_read: whether this TRL is one whose ways to encode, to score and to read pairs are replaced
    weights: precision, attention, quantization, commit and digest of what training began with
    untrained_rewards: reward models whose head is random
    metrics: at the end
    correctable: whether the cause is one that a person can correct in the config
    unexpected: metrics that are not as the recipe expects (check_expected)
    result_sha256: digest of the weights in model/
    peak_memory: bytes, of the process and of its devices
    after: what failed after the run was saved: card, curves, report, push
"""

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runner import disk
from runner.errors import ConfigError, RunPreempted, RunPruned, RunStopped
from runner.redaction import scrub

SCHEMA = 1
FILE = "manifest.json"
BEAT_SECONDS = 15.0  # between two heartbeats of a running process
SILENCE = 8  # heartbeats that fail to come before a process elsewhere is taken for dead
DIFF_LIMIT = 256 * 1024  # bytes of the dirty diff that are kept
CHANGED_LIMIT = 200  # files that are named as changed
GIT_SECONDS = 20  # before git is given up
TRACEBACK_LIMIT = 32 * 1024  # characters of a traceback, its end
LIBRARIES = [
    *("runner", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "tokenizers"),
    *("safetensors", "huggingface_hub", "hydra-core", "omegaconf", "pydantic", "numpy"),
]
SIGNAL_EXITS = {128 + 2: "SIGINT", 128 + 15: "SIGTERM"}  # the exit codes that signal handlers leave with

logger = logging.getLogger(__name__)
writing = threading.RLock()  # a heartbeat must not undo what is written beside it


def create(run_dir: str | Path, *, argv: Sequence[str] | None = None, **fields: Any) -> dict[str, Any]:
    """Write the first manifest of a run directory, with status ``created``, and return it.

    Args:
        run_dir: An existing directory; the digest of its ``config.yaml`` is recorded where there is one.
        argv: What was typed; ``sys.argv`` where absent.
        fields: Anything else that is known before the run, for example ``choices`` or ``seed``.
    """
    config, packages = Path(run_dir) / "config.yaml", _packages()
    manifest = {
        "schema": SCHEMA,
        "status": "created",
        "timeline": [{"status": "created", "time": _now()}],
        "argv": list(sys.argv if argv is None else argv),
        "config_sha256": disk.digest(config) if config.is_file() else None,
        "git": _git(),
        "versions": {
            "python": platform.python_version(),
            **{name: packages[name] for name in LIBRARIES if name in packages},
        },
        "packages": packages,
        "platform": _platform(),
        **fields,
    }
    return _write(run_dir, scrub(_plain(manifest)))


def read(run_dir: str | Path) -> dict[str, Any]:
    """Return the manifest of a run directory.

    Raises:
        ConfigError: The directory has no manifest, or one that cannot be read.
    """
    path = Path(run_dir) / FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{run_dir} cannot be read as a run directory: it has no {FILE}. "
            "A run directory is what a run prints at its end, for example outputs/<date>/<time>_<names>."
        ) from None
    except ValueError as fault:
        raise ConfigError(f"{path} cannot be read: {fault}. Restore it, or run again.") from None


def update(run_dir: str | Path, **fields: Any) -> dict[str, Any]:
    """Merge ``fields`` into the manifest, dictionaries key by key, and return it.

    A new ``status`` joins the timeline.
    """
    with writing:
        manifest = read(run_dir)
        if "status" in fields and fields["status"] != manifest.get("status"):
            event = {"status": fields["status"], "time": _now()}
            manifest["timeline"] = [*manifest.get("timeline", []), event]
        return _write(run_dir, _merge(manifest, scrub(_plain(fields))))  # what was there is clean


def rank() -> int:
    """Return the number of this process among those of the run; only the first writes the manifest."""
    return int(os.environ.get("RANK", "0"))


def claim(run_dir: str | Path) -> Any:
    """Return the lock of a run directory, held by this process; it ends with the process at the latest.

    Raises:
        ConfigError: Another process runs this directory.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(Path(run_dir) / ".lock")
    try:
        if rank() == 0:  # which holds it for all
            lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"{run_dir} is in use: a process still runs it. Wait for its end, or end it.") from None
    return lock


def is_dead(run_dir: str | Path, record: Mapping[str, Any]) -> bool:
    """Tell whether a run whose manifest says ``running`` ended without a word, by a kill or a lost machine.

    On the machine that it ran on its lock tells; elsewhere the silence of its heartbeat.
    """
    if record.get("status") != "running":
        return False
    if (record.get("platform") or {}).get("host") == platform.node():
        try:
            claim(run_dir).release()
        except ConfigError:
            return False
        return True
    return is_silent(record)


def is_silent(record: Mapping[str, Any]) -> bool:
    """Tell whether too many heartbeats of a run have failed to come."""
    beat = datetime.fromisoformat(record.get("heartbeat") or record["timeline"][-1]["time"])
    return (datetime.now(UTC) - beat).total_seconds() > SILENCE * BEAT_SECONDS


@contextlib.contextmanager
def beating(run_dir: str | Path) -> Iterator[None]:
    """Write inside, every few seconds, that the process is alive."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError, ConfigError):  # a full disk is for the run itself to tell
                update(run_dir, heartbeat=_now())

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def recording(run_dir: str | Path) -> Iterator[None]:
    """Keep the status of a run true: ``running`` inside, then ``completed``, ``failed`` or ``preempted``.

    Whatever ends the run is written with its cause and traceback and raised again.
    """
    lock = claim(run_dir)
    here = {"platform": _platform(), "process": os.getpid()}  # it may go on elsewhere
    update(run_dir, status="running", heartbeat=_now(), **here, cause=None, traceback=None)
    try:
        with beating(run_dir):
            yield
    except BaseException as fault:
        try:
            ending = _ending(fault)
            update(run_dir, **ending, peak_memory=peak_memory())
            if (Path(run_dir) / "ranks").is_dir() and ending["status"] == "failed":
                told = {**ending, "time": time.time(), "correctable": isinstance(fault, ConfigError)}
                (Path(run_dir) / "ranks" / f"{rank()}.json").write_text(json.dumps(scrub(told)), encoding="utf-8")
        except (OSError, ConfigError):  # a full disk must not hide why the run ended
            logger.exception("%s could not be updated", Path(run_dir) / FILE)
        raise
    else:
        update(run_dir, status="completed", peak_memory=peak_memory())
    finally:
        lock.release()


# ---- writing ----------------------------------------------------------------------------------------------


def _write(run_dir: str | Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write a manifest; only the first rank does."""
    if rank():
        return manifest
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    disk.write(Path(run_dir) / FILE, text + "\n")
    return manifest


def _plain(value: Any) -> Any:
    """Turn a tree into what JSON can hold; NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # lone surrogates of odd file names
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy and torch numbers and arrays
        return _plain(value.tolist())
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _merge(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# ---- how a run ended, and on what it ran ------------------------------------------------------------------


def _ending(fault: BaseException) -> dict[str, Any]:
    """Return status, cause and traceback for what ended a run."""
    status, cause = "failed", f"{type(fault).__name__}: {fault}"
    if isinstance(fault, ConfigError | RunStopped):
        cause = str(fault)
    elif isinstance(fault, RunPreempted | RunPruned):
        ended = "pruned" if isinstance(fault, RunPruned) else "preempted"
        return {"status": ended, "cause": str(fault), "traceback": None}
    elif isinstance(fault, KeyboardInterrupt):
        status, cause = "preempted", "interrupted from the keyboard (SIGINT)"
    elif isinstance(fault, SystemExit):
        signal = SIGNAL_EXITS.get(fault.code) if isinstance(fault.code, int) else None
        status = "preempted" if signal else "failed"
        cause = f"stopped by {signal}" if signal else f"the process left with exit code {fault.code}"
    text = "".join(traceback.format_exception(fault))
    return {"status": status, "cause": cause, "traceback": text[-TRACEBACK_LIMIT:]}


def peak_memory() -> dict[str, int]:
    """Return the peak memory of this process in bytes: of the host and, if CUDA was used, of its devices."""
    peak = {}
    with contextlib.suppress(ImportError):  # Windows has no resource module
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["device"] = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return peak


def _packages() -> dict[str, str]:
    """Return the version of all that is installed, from the names of its folders where they tell it: much faster.

    Source: https://packaging.python.org/en/latest/specifications/recording-installed-packages/
    """
    found: dict[str, str] = {}
    for dist in importlib.metadata.distributions():
        folder = Path(getattr(dist, "_path", ""))
        name, _, version = folder.stem.partition("-") if folder.suffix == ".dist-info" else ("", "", "")
        if not version:
            name, version = dist.metadata["Name"], dist.metadata["Version"]
        found.setdefault(name.lower().replace("_", "-"), version)  # the first is the one that is imported
    return dict(sorted(found.items()))


def _platform() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "host": platform.node(),
    }


def _git() -> dict[str, Any] | None:
    """Return commit, changed files and diff of the repository around the working directory, if any."""
    status = _ask_git("status", "--porcelain", "--untracked-files=normal")
    if status is None:
        return None
    commit = _ask_git("rev-parse", "HEAD")
    diff = _ask_git("diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD") if commit else None
    return {
        "commit": commit.strip() if commit else None,
        "dirty": bool(status.strip()),
        "changed": status.splitlines()[:CHANGED_LIMIT],
        "diff": diff or "",
        "diff_complete": diff is not None and len(diff) < DIFF_LIMIT,
    }


def _ask_git(*words: str) -> str | None:
    """Return what git says, cut at ``DIFF_LIMIT`` bytes; None if it fails, hangs or is not there."""
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.quotepath=false", *words]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        process = subprocess.Popen(command, stdin=null, stdout=pipe, stderr=null, env=environment)
    except OSError:
        return None
    assert process.stdout is not None
    timer = threading.Timer(GIT_SECONDS, process.kill)
    timer.start()
    with process:
        answer = process.stdout.read(DIFF_LIMIT)
        cut = len(answer) == DIFF_LIMIT
        if cut:
            process.kill()
    timer.cancel()
    return None if process.returncode and not cut else answer.decode("utf-8", "replace")
