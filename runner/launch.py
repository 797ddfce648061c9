"""Several processes for one run: the parent makes the run directory, ``torch.distributed.run`` starts a rank for each.

A rank is ``python -m runner.run RUN_DIR``; what it says goes to ``ranks/`` in the run directory, and what the first one
says to the terminal, too. Inside, SIGUSR1 asks a rank to end its step and save, and SIGTERM ends it at once. On several
machines each has a parent, for its own ranks; the first one's makes the directory, and tells the others where it is.
"""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import yaml

from runner import engines, hardware, lean, manifest
from runner.errors import ConfigError, RunPreempted, RunPruned, RunStopped

INSIDE = "RUNNER_LAUNCHED"  # in the ranks that this module starts, and their agent: the process that started them
GRACE = 5  # seconds that the other ranks have when one has failed
POLL = 0.2  # seconds
FAREWELL = 60  # seconds that a process which ends before there is a run waits for the others to hear of it
ENDED = "ended with "  # no path: all that are shared are absolute
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]  # to save, end
stores: list[Any] = []  # of the first rank, for as long as the others may ask
shared: list[int] = []  # in a trial: the threads that its sweep has given it

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where this machine stands among those of a run; ``host`` is empty where there is no other."""

    nodes: int = 1
    rank: int = 0
    host: str = ""
    port: int = 0


def processes(node: dict[str, Any]) -> int:
    """Return how many processes a ``launch`` node asks for on each machine."""
    if node.get("processes") != "auto":
        return int(node.get("processes") or 1)
    import torch

    return max(1, torch.cuda.device_count())


def world(node: dict[str, Any]) -> int:
    """Return how many processes a ``launch`` node asks for in all."""
    return processes(node) * place(node).nodes


def place(node: dict[str, Any]) -> Place:
    """Return where this machine stands; ``nodes=auto`` is told by Slurm, and is one machine without it.

    Raises:
        ConfigError: Slurm started more than one task on a machine.
    """
    nodes = node.get("nodes", 1)
    if nodes != "auto":
        host, _, port = str(node.get("rendezvous") or ":0").rpartition(":")
        return Place(nodes, node.get("node_rank", 0), host, int(port)) if nodes > 1 else Place()
    nodes, tasks = (int(os.environ.get(f"SLURM_STEP_NUM_{what}", "1")) for what in ("NODES", "TASKS"))
    if tasks > nodes:
        raise ConfigError(
            f"launch.nodes=auto starts processes on {nodes} machines itself, and srun started {tasks} tasks: give srun "
            "--ntasks-per-node=1, and launch.processes=... or a GPU for each process."
        )
    return Place(nodes, int(os.environ["SLURM_NODEID"]), *_meeting_of_slurm()) if nodes > 1 else Place()


def _meeting_of_slurm() -> tuple[str, int]:
    """Return the first host of the Slurm step, and a port that follows from the job, so that all know it."""
    first = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", os.environ["SLURM_STEP_NODELIST"])
    assert first is not None
    return "".join(filter(None, first.groups())), 20_000 + 2 * (int(os.environ["SLURM_JOB_ID"]) % 10_000)


def is_needed(node: dict[str, Any]) -> bool:
    """Tell whether ranks are to be started; not in one of them, and not in those of somebody else's launcher."""
    if is_led() or "LOCAL_RANK" in os.environ:  # some containers name a world of one
        return False
    return bool(node.get("fsdp") or node.get("deepspeed")) or world(node) > 1  # engines want a group of one, too


def refuse(config: dict[str, Any]) -> None:
    """Refuse what this machine cannot run, before anything is made or loaded.

    Raises:
        ConfigError: All that it lacks.
    """
    node, faults = config.get("launch") or {}, engines.vllm_faults(config["trainer"])
    if is_needed(node) or is_led():
        faults += engines.find_missing(node, processes=processes(node), use_cpu=bool(config["trainer"].get("use_cpu")))
    if faults:
        raise ConfigError("\n".join(faults))


def launch(run_dir: Path, node: dict[str, Any]) -> dict[str, float]:
    """Run a directory in several processes and return its metrics.

    Args:
        run_dir: The run directory.
        node: The config's ``launch``, as it is on this machine.

    Raises:
        RunPreempted, RunPruned: It was told to end.
        RunStopped: A rank failed, or did not begin in time; the manifest names the first.
        ConfigError: The config, the data, the model or this machine cannot give this run.
    """
    where, ranks = place(node), run_dir / "ranks"
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    if where.rank == 0:
        ranks.mkdir(exist_ok=True)
        for path in ranks.glob("*.*"):  # of an earlier start
            path.unlink()
        if where.nodes > 1:
            meet(node, run_dir)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads(processes(node)))}
    environment |= {lean.VARIABLE: lean.left_out(config), INSIDE: str(os.getpid())}
    code, signalled = _watch(_command(run_dir, node, where), environment, ranks, node, where)
    record = manifest.read(run_dir)
    if where.rank:
        return _follow(run_dir, code)
    name, ended = signal.Signals(signalled or signal.SIGTERM).name, 130 if signalled == signal.SIGINT else 143
    if record["status"] == "preempted" and signalled:  # which came to the ranks as SIGUSR1
        record = manifest.update(run_dir, cause=record["cause"].replace("SIGUSR1", name))
    if (metrics := _result(record, code, ended)) is not None:
        return metrics
    if signalled and not any(ranks.glob("*.json")):  # no rank had begun, or none was waited for
        manifest.update(run_dir, status="preempted", cause=f"stopped by {name}")
        raise RunPreempted(f"stopped by {name}", ended)
    failure = _first_failure(ranks)
    manifest.update(run_dir, status="failed", **failure)
    raise (ConfigError if failure.get("correctable") else RunStopped)(failure["cause"])


def _follow(run_dir: Path, code: int) -> dict[str, float]:
    """Return the metrics of a run whose manifest another machine's parent writes, or end as it does."""
    while (record := manifest.read(run_dir))["status"] == "running" and not manifest.is_silent(record):
        time.sleep(POLL)  # the first rank evaluates, or saves
    if (metrics := _result(record, code, 143)) is not None:
        return metrics
    cause = record.get("cause") or f"the ranks of this machine ended with exit code {code}"
    raise (ConfigError if record.get("correctable") else RunStopped)(cause)


def _result(record: dict[str, Any], code: int, ended: int) -> dict[str, float] | None:
    """Return the metrics of a run that came to its end, raise if it was told to end, and return None if it failed."""
    if record["status"] == "preempted":
        raise RunPreempted(record["cause"], ended)
    if record["status"] == "pruned":
        raise RunPruned(record["cause"])
    return record["metrics"] if record["status"] == "completed" and code == 0 else None


def threads(count: int) -> int:
    """Return the threads of each of some processes: what is given, or their part of what this one may use."""
    if shared:
        return max(1, shared[0] // count)
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else max(1, hardware.cores() // count)


def _command(run_dir: Path, node: dict[str, Any], where: Place) -> list[str]:
    count = processes(node)
    log, terminal = run_dir / "runner.log", os.fstat(1)  # where the first rank alone is heard
    first = 0 if where.rank or (log.exists() and os.path.samestat(terminal, log.stat())) else 1
    kept = ",".join(f"{number}:3" for number in range(first, count)) or "0"
    meeting = ["--standalone"] if where.nodes == 1 else [
        *(f"--nnodes={where.nodes}", f"--node-rank={where.rank}"),
        *(f"--master-addr={where.host}", f"--master-port={where.port}"),
    ]  # fmt: skip
    return [
        *(sys.executable, "-m", "runner.launch", f"--nproc-per-node={count}", *meeting),
        *(f"--shutdown-timeout={GRACE}", f"--log-dir={run_dir / 'ranks' / 'output'}", f"--redirects={kept}"),
        *("-m", "runner.run", str(run_dir)),
    ]


def _watch(
    command: list[str], environment: dict[str, str], ranks: Path, node: dict[str, Any], where: Place
) -> tuple[int, int | None]:
    """Run the command to its end, passing on what asks this process to end; return its code and the signal."""
    seen: list[int] = []
    own, total = range(where.rank * processes(node), (where.rank + 1) * processes(node)), world(node)

    def pass_on(number: int, frame: FrameType | None) -> None:
        again, paths = number in seen, [ranks / f"{rank}.pid" for rank in own]
        pids = [int(path.read_text()) for path in paths if path.exists()]
        seen.append(number)
        logger.warning("%s: the run ends %s", signal.Signals(number).name, "at once" if again else "after this step")
        if again or not pids:
            agent.terminate()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL if again else signal.SIGUSR1)

    start, limit = time.monotonic(), float(node.get("start_timeout") or 600)
    with (ranks / f"agent{where.rank or ''}.log").open("w", encoding="utf-8") as log:
        # a session of its own: Ctrl-C comes here only
        agent = subprocess.Popen(command, env=environment, stderr=log, start_new_session=True)
        with handling(dict.fromkeys(SIGNALS, pass_on)):
            while agent.poll() is None:
                time.sleep(POLL)
                late = time.monotonic() - start > limit
                if late and (waiting := total - len(list(ranks.glob("*.begun")))) > 0:
                    text = f"{waiting} of {total} ranks did not begin to train in {limit:g} s"
                    (ranks / "start.json").write_text(json.dumps({"time": time.time(), "cause": text}))
                    _end(agent)
                elif any(ranks.glob("machine*.ended")):  # another machine's ranks: ours would wait for them
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        agent.wait(GRACE)
                    _end(agent)
    if agent.returncode:
        (ranks / f"machine{where.rank}.ended").touch()
    return agent.returncode, seen[0] if seen else None


@contextlib.contextmanager
def handling(handlers: dict[int, Any]) -> Iterator[dict[int, Any]]:
    """Handle signals inside, and give what handled them before, which is put back."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(agent: "subprocess.Popen[bytes]") -> None:
    if agent.poll() is None:
        agent.terminate()
        agent.wait()


def _first_failure(ranks: Path) -> dict[str, Any]:
    """Return cause and traceback of the rank that failed first, as it said itself, or as its launcher saw it."""
    logs = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(ranks.glob("agent*.log"))]
    pattern = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)
    roots = [(found[1], int(found[2])) for log in logs if (found := pattern.search(log))]
    for rank, code in roots:
        if code < 0 and -code != signal.SIGTERM:  # what the others then say is that it is gone
            return {"cause": f"rank {rank} was killed by {signal.Signals(-code).name}", "traceback": None}
    told = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in ranks.glob("*.json")}
    if told:
        name, first = min(told.items(), key=lambda one: one[1]["time"])
        cause = first["cause"] if name in ("0", "start") else f"rank {name}: {first['cause']}"
        return {"cause": cause, "traceback": first.get("traceback"), "correctable": first.get("correctable", False)}
    cause = "rank {} left with exit code {}".format(*roots[0]) if roots else "the ranks could not be started"
    return {"cause": cause, "traceback": "\n".join(logs)[-manifest.TRACEBACK_LIMIT :]}


# ---- in the ranks ---------------------------------------------------------------------------------------------------


def is_ours() -> bool:
    """Tell whether this process is a rank that ``launch`` started."""
    return INSIDE in os.environ


def register(run_dir: Path) -> None:
    """Let the launcher find this rank; until training heeds its signal, it ends at once, and with its launcher."""
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(143))
    _end_with_parent()
    (run_dir / "ranks" / f"{manifest.rank()}.pid").write_text(str(os.getpid()))


def tell_begun(run_dir: Path) -> None:
    """Let the launcher know that this rank of ours computes: ``start_timeout`` no longer counts."""
    (run_dir / "ranks" / f"{manifest.rank()}.begun").touch()


def _end_with_parent() -> None:
    """End this process with the one that started it, also when that is killed, so that no rank is left behind."""
    parent = int(os.environ[INSIDE])

    def outlive() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=outlive, daemon=True).start()


# ---- other machines, and somebody else's launcher -------------------------------------------------------------------


def meet(node: dict[str, Any], run_dir: Path | None) -> Path:
    """Return the run directory of the first machine on all machines of a run.

    Args:
        node: The config's ``launch``.
        run_dir: The first machine's, made and written; None on the others, which wait for it.

    Raises:
        ConfigError, RunStopped: The first machine did not tell it in time, or ended without one.
        SystemExit: It ended well without one.
    """
    where, seconds = place(node), float(node.get("start_timeout") or 600)
    return _share(run_dir, where.host, where.port + 1, hosts=run_dir is not None, seconds=seconds)


def is_led() -> bool:
    """Tell whether somebody else's launcher (torchrun, accelerate, srun) started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not is_ours()


def agree(run_dir: Path | None) -> Path:
    """Return the first rank's run directory on all ranks that somebody else's launcher started.

    Args:
        run_dir: The first rank's, made and written; None on the others, which wait for it.

    Raises:
        ConfigError, RunStopped, SystemExit: As ``meet`` has them.
    """
    return _share(run_dir, *_meeting_of_launcher(hosts=run_dir is not None))


def _meeting_of_launcher(*, hosts: bool) -> tuple[str, int, bool]:
    """Return host and port of the store that somebody else's launcher has, or that we put beside it; who hosts it."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + (0 if agent else 1), hosts and not agent


@contextlib.contextmanager
def leading(node: dict[str, Any]) -> Iterator[None]:
    """Let those that wait for this process's run directory end as it does, where it ends before it has one."""
    try:
        yield
    except BaseException as error:
        where = place(node)
        others = int(os.environ["WORLD_SIZE"]) - 1 if is_led() else where.nodes - 1
        if others and not stores:
            code = (error.code or 0) if isinstance(error, SystemExit) else 2 if isinstance(error, ConfigError) else 1
            meeting = _meeting_of_launcher(hosts=True) if is_led() else (where.host, where.port + 1, True)
            with contextlib.suppress(RuntimeError):  # none is left that waits
                _tell_end(code, others, *meeting)
        raise


def _tell_end(code: Any, others: int, host: str, port: int, hosts: bool) -> None:
    """Say that there will be no run directory, and stay until the others have heard it, or seem to be gone."""
    store = _open_store(host, port, hosts, FAREWELL)
    store.set("runner/run_dir", f"{ENDED}{code}")
    late = time.monotonic() + FAREWELL
    while store.add("runner/heard", 0) < others and time.monotonic() < late:
        time.sleep(POLL)


def _share(run_dir: Path | None, host: str, port: int, hosts: bool, seconds: float = 300) -> Path:
    try:
        store = _open_store(host, port, hosts, seconds)
        if run_dir is not None:
            store.set("runner/run_dir", str(run_dir))
        told = store.get("runner/run_dir").decode()
    except (RuntimeError, TimeoutError) as error:
        raise RunStopped(
            f"The first process of this run is not to be met at {host}, port {port}: {str(error).splitlines()[0]}"
        ) from error
    if told.startswith(ENDED):
        store.add("runner/heard", 1)
        code, text = told.removeprefix(ENDED), "The first process of this run ended with exit code {}, see there"
        if code == "0":
            sys.exit(0)
        raise (ConfigError if code == "2" else RunStopped)(text.format(code))
    stores.append(store)
    return Path(told)


def _open_store(host: str, port: int, hosts: bool, seconds: float) -> Any:
    from torch.distributed import TCPStore

    return TCPStore(host, port, is_master=hosts, timeout=timedelta(seconds=seconds), wait_for_workers=False)


def adopt_tasks(node: dict[str, Any]) -> None:
    """Let the tasks of a Slurm step be the ranks of one run, as torchrun would have it; srun says only who they are.

    A config of several machines starts its own ranks on each: there, a task is a machine.
    """
    given, tasks = os.environ, int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "LOCAL_RANK" in given or tasks == 1 or node.get("nodes", 1) != 1:
        return
    host, port = _meeting_of_slurm()
    devices = given.get("CUDA_VISIBLE_DEVICES")  # of this task alone where srun has shared them out
    local = int(given["SLURM_LOCALID"]) % len(devices.split(",")) if devices else int(given["SLURM_LOCALID"])
    here = re.match(r"\d+", given.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    os.environ.update(
        RANK=given["SLURM_PROCID"], WORLD_SIZE=str(tasks), LOCAL_RANK=str(local), MASTER_ADDR=host,
        MASTER_PORT=str(port), LOCAL_WORLD_SIZE=here[0] if here else "1",
    )  # fmt: skip


def refuse_lost() -> None:
    """Refuse the one process that ``accelerate launch`` starts where several were asked for.

    Raises:
        ConfigError: It did. Source: accelerate 1.15, prepare_simple_launcher_cmd_env, which --cpu leads to
    """
    if {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes and has started one, as it does with --cpu. Type "
            "python -m runner launch=ddp launch.processes=2, or torchrun --nproc-per-node=2 -m runner."
        )


def main() -> None:
    """Be the agent of a machine's ranks, torch's own, for as long as the process that started it lives."""
    _end_with_parent()
    os.environ[INSIDE] = str(os.getpid())
    from torch.distributed import run

    run.main(sys.argv[1:])


if __name__ == "__main__":
    main()
