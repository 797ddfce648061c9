"""TRL's LM head scores supervised positions only, also where there is no Triton: a third of a step on a CPU."""

import inspect
import logging
from importlib.metadata import version
from typing import Any

logger = logging.getLogger(__name__)

VERSIONS = ("1.16",)  # minor versions of TRL whose source was read and whose losses were compared
COMPILED = frozenset({"neuron", "xla", "hpu"})  # compile for each shape, so that fewer positions cost more


def knows_trl() -> bool:
    """Tell whether the source of the installed TRL was read, and its private parts are what we take them for."""
    return version("trl").rsplit(".", 1)[0] in VERSIONS


def compact_lm_head() -> bool:
    """Let TRL leave prompt and padding out of the LM head; return whether it will.

    TRL does so on Triton devices and elsewhere scores every position, because its switch asks for Triton. Only
    the switch in ``add_fused_lm_head`` is replaced; the kernels are chosen by another name, which stays. A TRL
    whose source is not the one that was read keeps its own way.

    Source: trl/trainer/utils.py, ``add_fused_lm_head``: ``compact = _use_triton(hidden_states.device)``
    """
    from trl.trainer import utils

    switch: Any = getattr(utils, "_use_triton", None)
    if getattr(switch, "compacts", False):
        return True
    if not knows_trl() or switch is None or inspect.getsource(utils).count("_use_triton(") != 1:
        logger.info("TRL %s scores every position on devices without Triton: its own way is kept", version("trl"))
        return False

    def compacts(device: Any) -> bool:
        return device.type not in COMPILED or switch(device)

    compacts.compacts = True  # type: ignore[attr-defined]  # marks it as ours, so that it is replaced once
    utils._use_triton = compacts
    return True
