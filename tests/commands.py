"""Commands of ours as processes of their own, forked from a server that has imported the libraries.

A fork takes no imports, which are most of what a command on a tiny model costs. What is forked is what a shell would
start: ``python -m MODULE WORDS``, with its own signals, directory and variables. What a test says of the imports
themselves, or of processes that a launcher starts, it says of real ones.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from runner import launch, trials


class Command:
    """A running command; what it says, on both streams, is kept.

    Args:
        words: Of its command line.
        module: That is run.
        cwd: Where it runs.
        env: Its variables; by default this process's.
        first: A program that it runs before anything else.
    """

    def __init__(self, *words, module="runner", cwd=".", env=None, first=""):
        trials.warm([*trials.PRELOAD, "runner.check"], "")
        handle, name = tempfile.mkstemp(prefix="said-")
        os.close(handle)
        self._said = Path(name)
        told = (module, [str(word) for word in words], str(cwd), {**(os.environ if env is None else env)}, name, first)
        self._process = trials._context().Process(target=_be, args=told)
        self._process.start()
        self.pid = self._process.pid

    @property
    def said(self):
        """Return what it has said so far."""
        return self._said.read_text(encoding="utf-8", errors="replace")

    @property
    def returncode(self):
        """Return its exit code, minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait_for(self, text):
        """Wait until it has said something."""
        while text not in self.said:
            assert self._process.is_alive() or text in self.said, f"{text!r} did not come:\n{self.said}"
            time.sleep(0.02)

    def send_signal(self, number):
        """Send it a signal."""
        os.kill(self.pid, number)

    def end(self):
        """Wait for its end and return what it has said."""
        self._process.join()
        said = self.said
        self._said.unlink()
        self._said = Path(os.devnull)
        return said


def run(*words, **options):
    """Run a command to its end; return its exit code and what it said."""
    command = Command(*words, **options)
    said = command.end()
    return command.returncode, said


def run_ranks(*words, **options):
    """Run a command to its end in two ranks of one group, as a launcher starts them."""
    port = str(free_ports())
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [Command(*words, env=os.environ | meeting | {"RANK": n, "LOCAL_RANK": n}, **options) for n in "01"]
    said = [rank.end() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said


def free_ports():
    """Return a port that is free, and the next one, too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            with contextlib.suppress(OSError):
                second.bind(("127.0.0.1", port + 1))
                return port


def _be(module, words, cwd, env, said, first):
    multiprocessing.process._parent_process = None  # no trial of ours, but a command
    signal.pthread_sigmask(signal.SIG_UNBLOCK, launch.SIGNALS)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    with open(said, "ab", buffering=0) as file:  # noqa: PTH123
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
            stream.reconfigure(line_buffering=True)
    sys.argv = ["", *words]
    exec(first, {})
    runpy.run_module(module, run_name="__main__", alter_sys=True)
