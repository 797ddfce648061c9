"""curves.png: what metrics.jsonl holds, as small multiples, one subject each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b7791f", "#718096")
MOST = 12  # panels
SMOOTH_FROM = 40  # points; below it every point is drawn as it is
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (  # TRL's metric names; a held-out twin begins with eval_
    ("Loss", ("loss",)),
    ("Reward", ("reward",)),
    ("Score", ("objective/scores",)),
    ("Reward margin", ("rewards/margins", "margin")),
    ("Chosen above rejected (share)", ("rewards/accuracies", "accuracy")),
    ("Implicit rewards", ("rewards/chosen", "rewards/rejected")),
    ("Rewards", ("max_reward", "mean_reward", "min_reward")),
    ("KL to the reference", ("kl",)),
    ("KL to the reference (per completion)", ("objective/kl",)),
    ("Entropy of the policy", ("entropy", "policy/entropy_avg")),
    ("Value loss", ("loss/value_avg",)),
    ("Variance of the returns explained by the values (share)", ("val/explained_variance",)),
    ("Completion length (tokens)", ("completions/mean_length",)),
    ("Completions cut at the limit (share)", ("completions/clipped_ratio",)),
    ("Completions that end (share)", ("completions/ended_ratio",)),
    ("Clipped tokens (share)", ("policy/clipfrac_avg", "clip_ratio/low_mean", "clip_ratio/high_mean")),
    ("Groups that teach nothing (share)", ("frac_reward_zero_std",)),
    ("Log-probability of the answer", ("logps/chosen", "logps/rejected")),
    ("Tokens predicted right (share)", ("mean_token_accuracy",)),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("learning_rate",)),
)
UNIT = {"Held-out answers", "Chosen above rejected (share)"}  # drawn from 0 to 1 where the values allow it
IDLE = {"clip_ratio/low_mean", "clip_ratio/high_mean"}  # not worth a panel while always zero


def series(lines: Sequence[Line], name: str) -> tuple[list[int], list[float]]:
    """Return steps and values of a metric, in order; of a step that was logged twice, the last."""
    found = {line["step"]: float(line[name]) for line in lines if isinstance(line.get(name), int | float)}
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def panels(lines: Sequence[Line], scores: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Return titles and metric names of what there is to draw, the most telling first.

    Args:
        lines: Of metrics.jsonl.
        scores: Names of the scores of held-out answers: ``eval_<score>`` gets a panel.
    """
    terms = sorted({name for line in lines for name in line if name.startswith("rewards/") and name.endswith("/mean")})
    wanted = list(PANELS)
    if len(terms) > 1:
        wanted.insert(2, ("Reward terms", tuple(terms)))
    if scores:
        wanted.insert(1, ("Held-out answers", tuple(f"eval_{score}" for score in scores)))
    found = []
    for title, names in wanted:
        drawn = tuple(
            name for name in names if (values := series(lines, name)[1]) and not (name in IDLE and not any(values))
        )
        if drawn:
            found.append((title, drawn))
    return found[:MOST]


def plot(lines: Sequence[Line], path: str | Path, *, title: str, scores: Sequence[str] = ()) -> bool:
    """Draw the curves into a PNG file; False where there is nothing to draw."""
    from matplotlib import rc_context
    from matplotlib.artist import Artist

    Artist._update_set_signature_and_docstring = lambda: None  # type: ignore[attr-defined]  # a third of the import
    from matplotlib.figure import Figure

    chosen = panels(lines, scores)
    if not chosen:
        return False
    columns = {1: 1, 2: 2, 4: 2}.get(len(chosen), 3 if len(chosen) in {3, 5, 6, 9} else 4)
    rows = -(-len(chosen) // columns)
    style: Any = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style | {"axes.edgecolor": "#a0aec0", "xtick.color": "#4a5568", "ytick.color": "#4a5568"}):
        width, height = 4.2 * columns, 2.7 * rows + 0.5
        figure = Figure(figsize=(width, height))
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color="#1a202c")
        last, explained = max(line["step"] for line in lines), []  # the same colours need one legend
        for place, (name, metrics) in enumerate(chosen):
            axes = figure.add_subplot(rows, columns, place + 1, sharex=figure.axes[0] if figure.axes else None)
            axes.set_title(name, loc="left", y=1.0, color="#2d3748")
            axes.locator_params("x", nbins=4, integer=True)
            axes.locator_params("y", nbins=4)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xlim(-0.02 * max(last, 1), 1.02 * max(last, 1))
            axes.set_xlabel("step", color="#4a5568")
            axes.xaxis.set_visible(place + columns >= len(chosen))  # ticks are most of what drawing costs
            _draw(axes, lines, metrics)
            labels = axes.get_legend_handles_labels()[1]
            if labels not in explained and (len(labels) > 1 or metrics[0].startswith("eval_")):
                axes.legend(frameon=False, fontsize=8, handlelength=1.4, loc="best")
                explained.append(labels)
            if name in UNIT and axes.get_ylim()[0] > -0.1 and axes.get_ylim()[1] < 1.1:
                axes.set_ylim(-0.04, 1.04)
        # by hand, in inches: a layout engine would draw all twice, which takes longer than a short training
        edges = {"left": 0.75 / width, "right": 1 - 0.15 / width, "bottom": 0.5 / height, "top": 1 - 0.75 / height}
        figure.subplots_adjust(**edges, wspace=0.24, hspace=0.32)
        figure.savefig(path, dpi=130, pil_kwargs={"compress_level": 1})
    return True


def _draw(axes: Any, lines: Sequence[Line], metrics: tuple[str, ...]) -> None:
    """Draw each metric in its colour, what was held out as points joined by dashes."""
    several = len(metrics) > 1
    for number, metric in enumerate(metrics):
        colour = COLOURS[number % len(COLOURS)]
        held_out = metric.startswith("eval_")
        label = metric.removeprefix("eval_").removesuffix("/mean").rsplit("/", 1)[-1].replace("_", " ")
        steps, values = series(lines, metric)
        if held_out:
            axes.plot(steps, values, "o-", color=colour, markersize=4, linewidth=1.5, label=label)
        else:
            smooth = _smooth(values) if metric != "learning_rate" else []
            axes.plot(steps, values, color=colour, linewidth=1, alpha=0.25 if smooth else 1)
            axes.plot(steps, smooth or values, color=colour, linewidth=1.7, label=label if several else "train")
        steps, values = series(lines, f"eval_{metric}")
        if steps:
            shade, name = (colour, f"{label}, held out") if several else (COLOURS[1], "held out")
            axes.plot(steps, values, "o--", color=shade, markersize=4, linewidth=1.2, label=name)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.7)
    axes.set_axisbelow(True)
    low, high = axes.get_ylim()
    if high - low < 1e-9:  # a constant: leave air around it
        axes.set_ylim(low - 0.5, high + 0.5)


def _smooth(values: list[float]) -> list[float]:
    """Return centred running means over about a fifteenth of the points; nothing where there are few."""
    if len(values) < SMOOTH_FROM:
        return []
    half = max(1, len(values) // 30)
    sides = [max(half // 2, min(half, at, len(values) - 1 - at)) for at in range(len(values))]  # shorter at the ends
    windows = (values[max(0, at - side) : at + side + 1] for at, side in enumerate(sides))
    return [sum(window) / len(window) for window in windows]
