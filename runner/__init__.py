"""Post-train a language model from a config."""

import atexit
import gc
import logging
import os
import sys

# bitsandbytes asks for a kernel without a backward pass as it is imported, and says of every layer in every pass that
# 8-bit matrices multiply halves; datasets tells which libraries are there.
for noisy in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions", "datasets"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

if sys.argv[:1] == ["-m"]:  # a command of ours: what it imports stays, and most commands end soon; see runner.lean
    gc.disable()
    atexit.register(gc.freeze)  # nor is all of it looked through as the command ends

if "RUNNER_LEAVE_OUT" in os.environ:  # this process is for runs
    from runner import lean

    lean.begin(os.environ[lean.VARIABLE])
