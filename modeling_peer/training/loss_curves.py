"""Training losses of groups of runs as a picture."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

# steps of logging that one point of a curve averages, so that the differences show through the noise of batches
SMOOTHED = 10


def plot_losses(groups: Mapping[str, Sequence], path: str) -> None:
    """Draw every run thinly in its group's colour, and the group's mean over them, and write a PNG.

    Args:
        groups: runs by name, each with `steps` and `losses` of equal length.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, runs) in enumerate(groups.items()):
        color = f"C{number}"
        curves = [_smooth(run.losses) for run in runs]
        for run, curve in zip(runs, curves, strict=True):
            axes.plot(run.steps[len(run.steps) - len(curve) :], curve, color=color, alpha=0.3, linewidth=0.8)
        steps = runs[0].steps
        length = min(map(len, curves))
        average = [sum(values) / len(values) for values in zip(*(curve[:length] for curve in curves), strict=True)]
        axes.plot(steps[len(steps) - length :], average, color=color, label=f"{name} ({len(runs)} seeds)")
    axes.set(xlabel="step", ylabel=f"training loss, mean of {SMOOTHED} logged values")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=150)


def _smooth(losses: Sequence[float]) -> list[float]:
    return [sum(losses[i - SMOOTHED : i]) / SMOOTHED for i in range(SMOOTHED, len(losses) + 1)] or list(losses)
