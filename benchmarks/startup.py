"""Start-up beside a bare Hydra app with the same groups and options: `python benchmarks/startup.py`.

Of the runs of a command the least counts: what else a machine does only adds to it.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import measure

BARE = """
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config):
    pass

if __name__ == "__main__":
    main()
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    print("| command | bare Hydra, CPU s | runner, CPU s | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder, "bare.py")
        bare.write_text(BARE)
        shutil.copytree(root / "conf", Path(folder, "conf"))
        for words in (["--help"], ["--cfg", "job"], ["-sc", "query=bash"]):
            costs = measure.alternate(
                {"bare": [sys.executable, str(bare), *words], "runner": [sys.executable, "-m", "runner", *words]},
                runs=arguments.runs,
                cwd=root,
                env={"COMP_LINE": "runner trainer=", "COMP_POINT": "15"},  # what a shell asks with
            )
            ours, theirs = (min(cost.cpu for cost in costs[side]) for side in ("runner", "bare"))
            print(f"| `{' '.join(words)}` | {theirs:.2f} | {ours:.2f} | {ours / theirs:.2f} |")
        refused = [sys.executable, "-m", "runner", "trainer=dpo", "trainer.bta=0.2"]
        least = min(measure.run(refused, cwd=root, fails=True).cpu for _ in range(arguments.runs))
        print(f"| `trainer.bta=0.2` (refused) | | {least:.2f} | |")


if __name__ == "__main__":
    main()
