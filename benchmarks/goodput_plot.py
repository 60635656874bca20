"""Draws goodput by trace and policy: a line of points for each trace."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.measuring import Row

_COLOURS = ("#0b6e4f", "#e08e0b", "#b3261e")
_MARKERS = ("o", "s", "X")


def plot(
    rows: Sequence[Row], names: Mapping[str, Sequence[str]], step_seconds: float, to: Path
) -> None:
    """One panel a mode, one line a trace, one point a policy; what-if rows are left out.

    `names` are the traces of each mode, in the order of the rows' values.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ending = f", steps of {step_seconds:g} s"
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.figure.endswith(ending) and not row.contestant.startswith("if "):
            panels.setdefault(row.figure.removesuffix(ending), []).append(row)
    heights = [max(2, len(of[0].values)) for of in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        figsize=(9, 1.8 + 0.32 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for axis, (mode, of) in zip(axes[:, 0], panels.items(), strict=True):
        ours = of[0].values
        order = sorted(range(len(ours)), key=ours.__getitem__)
        for row, colour, marker in zip(of, _COLOURS, _MARKERS, strict=False):
            values = [row.values[place] for place in order]
            axis.plot(values, range(len(order)), marker, color=colour, label=row.contestant)
        axis.set_yticks(
            range(len(order)), [_label(names[mode][place]) for place in order], fontsize=7
        )
        axis.set_ylim(-0.7, len(order) - 0.3)
        axis.grid(axis="x", alpha=0.4)
        axis.axvline(99, color="grey", linestyle=":", linewidth=1)
        axis.set_title({"single": "single host"}.get(mode, mode), loc="left", fontsize=9)
    axes[-1, 0].set_xlabel(f"useful time, % of available time; steps of {step_seconds:g} s")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    figure.suptitle("Goodput under spot traces, without any notice", fontsize=10)
    figure.savefig(to, dpi=120)
    pyplot.close(figure)


def _label(name: str) -> str:
    return " ".join(name.split("__")[-2:])
