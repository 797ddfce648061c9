"""The entry through which Hydra finds the runner's sweeper. Every start of Hydra imports this file: it stays thin."""

from typing import Any

from hydra.plugins.sweeper import Sweeper


class RunnerSweeper(Sweeper):
    """Hand a sweep to ``runner.sweep``."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keep the composed config, which says where the sweep goes."""
        self.config = config

    def sweep(self, arguments: list[str]) -> Any:
        """Run all trials; ends the process with an exit code other than 0 where that is due."""
        from runner.sweep import main

        return main(self.config.hydra, arguments)
