"""Where a model or a dataset comes from: a folder, the hub's cache, or the hub, told apart in about a second."""

import logging
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from runner.errors import ConfigError

logger = logging.getLogger(__name__)

REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
PROBE_SECONDS = 2.0


def resolve(name_or_path: str, *, key: str, marker: str = "config.json") -> str:
    """Return the absolute path of a local folder, or a hub id as it is.

    Args:
        name_or_path: A folder or a hub id.
        key: The config key it comes from, for messages.
        marker: A file that such a folder has.

    Raises:
        ConfigError: It is neither a folder nor a hub id, or a folder of something else.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        raise ConfigError(f"{key}={name_or_path} is a file. Name the folder it is in: {key}={path.parent}")
    if path.is_dir():
        if not (path / marker).exists() and not (path / "adapter_config.json").exists():
            below = [name for name in ("model", "checkpoints") if (path / name).is_dir()]
            hint = f"Did you mean {key}={path / below[0]}?" if below else "Name the folder that save_pretrained made."
            raise ConfigError(f"{key}={name_or_path} cannot be loaded: the folder has no {marker}. {hint}")
        return str(path.absolute())
    if not REPO_ID.fullmatch(name_or_path) or name_or_path.startswith("."):
        raise ConfigError(
            f"{key}={name_or_path} does not exist: there is no folder {path.absolute()}, and it is not the form of "
            f"a hub id. Name a folder, or an id such as {key}=HuggingFaceTB/SmolLM2-360M-Instruct"
        )
    return name_or_path


def ensure_available(
    repo: str, *, key: str, revision: str | None = None, kind: str = "model", marker: str = "config.json"
) -> None:
    """Return when ``repo`` can be loaded; with a hub that does not answer, from its cache only.

    A hub that does not answer costs the libraries a minute of retries; this takes two seconds at most. Where a
    proxy is set the hub is not probed, because only the proxy can tell.

    Raises:
        ConfigError: It is not in the cache, and the hub is switched off or does not answer.
    """
    if Path(repo).is_dir():
        return
    from huggingface_hub import constants, is_offline_mode, try_to_load_from_cache

    found = isinstance(try_to_load_from_cache(repo, marker, revision=revision, repo_type=kind), str)
    at = f"{repo} (revision {revision})" if revision else repo
    if is_offline_mode():
        if not found:
            raise ConfigError(
                f"{key}={at} cannot be loaded: it is not in the hub's cache ({constants.HF_HUB_CACHE}), and the hub "
                "is switched off (HF_HUB_OFFLINE). Unset HF_HUB_OFFLINE, or name a local folder."
            )
    elif not _answers(constants.ENDPOINT):
        if not found:
            raise ConfigError(
                f"{key}={repo} cannot be loaded: there is no folder of that name here, it is not in the hub's cache "
                f"({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} does not answer. Name a local folder, or set "
                "HF_ENDPOINT to a mirror, or HTTPS_PROXY. model=smollm135m needs no hub."
            )
        logger.warning("%s does not answer: %s comes from the cache", constants.ENDPOINT, at)
        os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes; this one read it already
        constants.HF_HUB_OFFLINE = True


def ask(repo: str, *, key: str, revision: str | None, kind: str, timeout: float) -> str:
    """Return the commit that the hub has of a repository, as ``commit abc1234``; empty where it says nothing.

    Raises:
        ConfigError: The hub says that it is missing, private or gated.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        about = api.repo_info(repo, repo_type=kind, revision=revision, timeout=timeout)
        if getattr(about, "gated", False):
            api.auth_check(repo, repo_type=kind)
    except (errors.GatedRepoError, errors.RevisionNotFoundError, errors.RepositoryNotFoundError) as error:
        with explained(repo, key=key):
            raise OSError(str(error).splitlines()[0]) from error
    except Exception as error:  # noqa: BLE001  whatever its HTTP library raises: it only means that nothing is known
        logger.warning("%s=%s: the hub could not be asked: %s", key, repo, error)
        return ""
    return f"commit {about.sha[:7]}" if about.sha else ""


@contextmanager
def explained(name: str, *, key: str) -> Iterator[None]:
    """Turn what ``from_pretrained`` raises for a model that it cannot load into a ConfigError.

    Raises:
        ConfigError: The repository is gated or missing, needs code of its own, or its files cannot be read.
    """
    from huggingface_hub import errors
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
            chain.append(cause)
        if any(isinstance(one, errors.GatedRepoError) for one in chain):
            hint = f"Accept its licence at https://huggingface.co/{name}, then log in: hf auth login"
        elif any(isinstance(one, errors.RevisionNotFoundError) for one in chain):
            hint = "The repository has no such revision: name a branch, tag or commit, or leave it null."
        elif any(isinstance(one, errors.RepositoryNotFoundError) for one in chain):
            hint = "There is no such repository, or it is private: check its id, or log in: hf auth login"
        elif "trust_remote_code" in str(error):
            hint = "It brings its own Python code; to run that, type model.trust_remote_code=true."
        elif "attn_implementation" in str(error) or "FlashAttention" in str(error):
            hint = "Choose another, for example model.attn_implementation=sdpa, or leave it null."
        elif "safetensors" in str(error) and not isinstance(error, SafetensorError):
            hint = (
                "Weights are read from safetensors, because pickled ones can run code: convert them, or, if you trust "
                "their author, type model.allow_pickle=true."
            )
        else:
            hint = "Check the name, and that its files are complete."
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"{key}={name} cannot be loaded: {said} {hint}") from error


@cache
def _answers(endpoint: str) -> bool:
    """Tell whether a connection to ``endpoint`` can be made, looking its name up included."""
    if any(os.environ.get(name) for name in PROXIES):
        return True
    url = urlsplit(endpoint)
    address = (url.hostname or endpoint, url.port or (80 if url.scheme == "http" else 443))
    answered = threading.Event()

    def probe() -> None:
        try:
            socket.create_connection(address, timeout=PROBE_SECONDS).close()
        except OSError:
            return
        answered.set()

    thread = threading.Thread(target=probe, daemon=True)  # a name server can take longer than any timeout
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()
