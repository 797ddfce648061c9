"""Several processes for one run: the parent makes the run directory, ``torch.distributed.run`` starts a rank for each.

A rank is ``python -m runner.run RUN_DIR``; what it says goes to ``ranks/`` in the run directory, and what the first one
says to the terminal, too. Inside, SIGUSR1 asks a rank to end its step and save, and SIGTERM ends it at once.
"""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from runner import lean, manifest
from runner.errors import ConfigError, RunPreempted, RunStopped

INSIDE = "RUNNER_LAUNCHED"  # set in the ranks that this module starts
GRACE = 5  # seconds that the other ranks have when one has failed
POLL = 0.2  # seconds
stores: list[Any] = []  # of the first rank, for as long as the others may ask

logger = logging.getLogger(__name__)


def processes(node: dict[str, Any]) -> int:
    """Return how many processes a ``launch`` node asks for."""
    if node.get("processes") != "auto":
        return int(node.get("processes") or 1)
    import torch

    return max(1, torch.cuda.device_count())


def is_needed(node: dict[str, Any]) -> bool:
    """Tell whether ranks are to be started; not in one of them, and not in those of somebody else's launcher."""
    return "WORLD_SIZE" not in os.environ and processes(node) > 1


def launch(run_dir: Path, node: dict[str, Any]) -> dict[str, float]:
    """Run a directory in several processes and return its metrics.

    Args:
        run_dir: The run directory.
        node: The config's ``launch``.

    Raises:
        RunPreempted: It was told to end.
        RunStopped: A rank failed, or did not begin in time; the manifest names the first.
        ConfigError: The config, the data or the model cannot give this run.
    """
    ranks = run_dir / "ranks"
    ranks.mkdir(exist_ok=True)
    for path in ranks.glob("*.*"):  # of an earlier start
        path.unlink()
    threads = max(1, (os.cpu_count() or 1) // processes(node))
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, lean.VARIABLE: lean.left_out(config), INSIDE: "1"}
    code, signalled = _watch(_command(run_dir, node), environment, ranks, node)
    record = manifest.read(run_dir)
    if record["status"] == "completed" and code == 0:
        return record["metrics"]
    if record["status"] == "preempted":
        if signalled:  # which came to the ranks as SIGUSR1
            record = manifest.update(run_dir, cause=record["cause"].replace("SIGUSR1", signal.Signals(signalled).name))
        raise RunPreempted(record["cause"], 130 if signalled == signal.SIGINT else 143)
    failure = _first_failure(ranks)
    manifest.update(run_dir, status="failed", **failure)
    raise (ConfigError if failure.get("correctable") else RunStopped)(failure["cause"])


def _command(run_dir: Path, node: dict[str, Any]) -> list[str]:
    kept = ",".join(f"{number}:3" for number in range(1, processes(node))) or "0"
    return [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes(node)}", "--standalone"),
        *(f"--shutdown-timeout={GRACE}", f"--log-dir={run_dir / 'ranks' / 'output'}", f"--redirects={kept}"),
        *("-m", "runner.run", str(run_dir)),
    ]


def _watch(
    command: list[str], environment: dict[str, str], ranks: Path, node: dict[str, Any]
) -> tuple[int, int | None]:
    """Run the command to its end, passing on what asks this process to end; return its code and the signal."""
    seen: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        again, pids = number in seen, [int(path.read_text()) for path in ranks.glob("*.pid")]
        seen.append(number)
        logger.warning("%s: the run ends %s", signal.Signals(number).name, "at once" if again else "after this step")
        if again or not pids:
            agent.terminate()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL if again else signal.SIGUSR1)

    start = time.monotonic()
    with (ranks / "agent.log").open("w", encoding="utf-8") as log:  # a session of its own: Ctrl-C comes here only
        agent = subprocess.Popen(command, env=environment, stderr=log, start_new_session=True)
        before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            while agent.poll() is None:
                time.sleep(POLL)
                late = time.monotonic() - start > float(node.get("start_timeout") or 600)
                if late and (waiting := processes(node) - len(list(ranks.glob("*.begun")))) > 0:
                    text = f"{waiting} of {processes(node)} ranks did not begin to train in {node['start_timeout']} s"
                    (ranks / "start.json").write_text(json.dumps({"time": time.time(), "cause": text}))
                    agent.terminate()
                    agent.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return agent.returncode, seen[0] if seen else None


def _first_failure(ranks: Path) -> dict[str, Any]:
    """Return cause and traceback of the rank that failed first, as it said itself, or as its launcher saw it."""
    log = (ranks / "agent.log").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", log[log.rfind("Root Cause") :], re.DOTALL)
    code = int(found[2]) if found else 0
    if found and code < 0 and -code != signal.SIGTERM:  # what the others then say is that it is gone
        return {"cause": f"rank {found[1]} was killed by {signal.Signals(-code).name}", "traceback": None}
    told = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in ranks.glob("*.json")}
    if told:
        name, first = min(told.items(), key=lambda one: one[1]["time"])
        cause = first["cause"] if name in ("0", "start") else f"rank {name}: {first['cause']}"
        return {"cause": cause, "traceback": first.get("traceback"), "correctable": first.get("correctable", False)}
    cause = f"rank {found[1]} left with exit code {code}" if found else "the ranks could not be started"
    return {"cause": cause, "traceback": log[-manifest.TRACEBACK_LIMIT :]}


# ---- somebody else's launcher ---------------------------------------------------------------------------------------


def is_ours() -> bool:
    """Tell whether this process is a rank that ``launch`` started."""
    return INSIDE in os.environ


def register(run_dir: Path) -> None:
    """Let the launcher find this rank; until training heeds its signal, it ends at once."""
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(143))
    (run_dir / "ranks" / f"{manifest.rank()}.pid").write_text(str(os.getpid()))


def is_led() -> bool:
    """Tell whether somebody else's launcher (torchrun, accelerate, srun) started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not is_ours()


def agree(run_dir: Path | None) -> Path:
    """Return the first rank's run directory on all ranks that somebody else's launcher started.

    Args:
        run_dir: The first rank's, made and written; None on the others, which wait for it.
    """
    from torch.distributed import TCPStore

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = int(os.environ["MASTER_PORT"]) + (0 if agent else 1)
    stores.append(TCPStore(os.environ["MASTER_ADDR"], port, is_master=not agent and run_dir is not None))
    if run_dir is not None:
        stores[-1].set("runner/run_dir", str(run_dir))
    return Path(stores[-1].get("runner/run_dir").decode())
