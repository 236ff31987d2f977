"""Tables for people: on the terminal, in Markdown, against a saved run, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tests.benchmarks.rows import Row, Run

HEADINGS = ("model", "server", "load", "items/s", "items/CPU-s", "of raw", "p50 ms", "p95 ms", "p99 ms")
MORE = ("client CPU", "MB", "errors")


def cells(one: Row) -> list[str]:
    """What the columns of HEADINGS say."""
    return [
        one.model, one.server, one.load, figure(one.items_per_second), figure(one.items_per_cpu_second),
        f"{one.of_raw:.2f}" if one.of_raw else "", *(figure(value) for value in (one.p50_ms, one.p95_ms, one.p99_ms)),
    ]  # fmt: skip


def figure(value: float) -> str:
    """Three digits, more only before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints the table and, where the servers told, their stages."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in (*HEADINGS, *MORE):
        table.add_column(heading, justify="left" if heading in HEADINGS[:3] else "right", no_wrap=True)
    for one in rows:
        table.add_row(*cells(one), f"{one.client_cpu:.2f}", figure(one.memory_mb), str(one.errors))
    console.print(table)
    staged = [one for one in rows if one.stages]
    if staged:
        stages = list(dict.fromkeys(name for one in staged for name in one.stages))
        table = Table(box=box.SIMPLE_HEAD, title="mean milliseconds of a request by the server's clock")
        for heading in ("model", "server", "load", *stages):
            table.add_column(heading, justify="left" if heading in HEADINGS[:3] else "right")
        for one in staged:
            table.add_row(one.model, one.server, one.load, *(f"{one.stages.get(name, 0):.2f}" for name in stages))
        console.print(table)


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|---|" + "---:|" * (len(HEADINGS) - 3)]
    return "\n".join([*lines, *("| " + " | ".join(cells(one)) + " |" for one in rows)]) + "\n"


def compare(run: Run, saved: Run, console: Console) -> None:
    """Prints how much more or less than in the saved run.

    Machines drift, so the share of raw is the comparison to trust; that of items per CPU-second holds in one session.
    """
    before = {one.key: one for one in saved.rows}
    table = Table(box=box.SIMPLE_HEAD, title=f"against {saved.settings.get('date', 'the saved run')}")
    for heading in (*HEADINGS[:3], "items/CPU-s", "before", "times", "of raw, times", "p50, times"):
        table.add_column(heading, justify="left" if heading in HEADINGS[:3] else "right")
    for one in run.rows:
        old = before.get(one.key)
        if old is None:
            continue
        figures = (figure(one.items_per_cpu_second), figure(old.items_per_cpu_second))
        times = _times(one.items_per_cpu_second, old.items_per_cpu_second)
        table.add_row(
            *one.key[1::-1], one.load, *figures, times, _times(one.of_raw, old.of_raw), _times(one.p50_ms, old.p50_ms)
        )
    console.print(table)


def _times(new: float, old: float) -> str:
    return f"{new / old:.2f}" if old else ""


def picture(rows: Sequence[Row], path: Path) -> None:
    """Bars: the share of raw of each server, a group for each model, at the highest load that was measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    served = [one for one in rows if one.server != "raw" and not one.rate]
    if not served:
        return
    inflight = max(one.inflight for one in served)
    served = [one for one in served if one.inflight == inflight]
    models, servers = (list(dict.fromkeys(getattr(one, name) for one in served)) for name in ("model", "server"))
    figure_, axes = pyplot.subplots(
        1, len(models), figsize=(3.2 * len(models), 3.2), layout="constrained", squeeze=False
    )
    for axis, model in zip(axes[0], models, strict=True):
        mine = {one.server: one for one in served if one.model == model}
        shown = [name for name in servers if name in mine]
        bars = axis.bar(shown, [mine[name].items_per_cpu_second for name in shown], color="#4c72b0")
        axis.bar_label(bars, [figure(mine[name].items_per_cpu_second) for name in shown], fontsize=8)
        best = max((one.items_per_cpu_second for one in rows if one.server == "raw" and one.model == model), default=0)
        if best and best < 3 * max(one.items_per_cpu_second for one in mine.values()):
            axis.axhline(best, color="#c44e52", linewidth=1)
            axis.text(-0.4, best, f"raw ONNX Runtime {figure(best)}", color="#c44e52", fontsize=8, va="bottom")
        axis.set_title(model)
        axis.margins(y=0.15)
        axis.tick_params(axis="x", labelrotation=45, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"items a server-CPU-second, {inflight} in flight")
    figure_.savefig(path, dpi=110)
    pyplot.close(figure_)
