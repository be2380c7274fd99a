"""A comparison as a person reads it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .compare import Comparison, Measurement, processor


def show(comparison: Comparison, console: Console, title: str) -> None:
    """Print whether both sides agree, what each took, and who served."""
    output, gradient = comparison.tolerances
    served = " and ".join(f"{op} on {chosen!r}" for op, chosen in comparison.chosen.items())
    agreement = Table(title=f"{title}\nOurs ({served}) against plain PyTorch", title_justify="left")
    for column in ("", "relative error", "allowed", ""):
        agreement.add_column(column, justify="right" if column else "left")
    for name, error, allowed in (
        ("output", comparison.output_error, output),
        ("output of decoding", comparison.decoding_error, output),
        (f"gradient, worst in {comparison.worst_parameter}", comparison.gradient_error, gradient),
    ):
        if error is None:
            continue
        verdict = "[green]agrees[/]" if error <= allowed else "[bold red]differs[/]"
        agreement.add_row(name, f"{error:.1e}", f"{allowed:.0e}", verdict)
    agreement.caption = ", ".join(f"loss on {side} {loss:.6f}" for side, loss in comparison.loss.items())
    console.print(agreement)

    cost = Table(title=f"Medians of {comparison.repetitions} on {processor(comparison.device)}", title_justify="left")
    for column in ("", "ours", "PyTorch", "faster", "peak memory, ours", "PyTorch", "less"):
        cost.add_column(column, justify="right" if column else "left")
    for phase, sides in comparison.measured.items():
        ours, reference = sides["kernels"], sides["reference"]
        speedup = comparison.speedup(phase)
        cost.add_row(
            phase,
            duration(ours.seconds),
            duration(reference.seconds),
            f"[bold]{speedup:.1f}×[/]" if speedup else "–",
            _megabytes(ours),
            _megabytes(reference),
            f"{reference.peak / ours.peak:.1f}×" if speedup and ours.peak and reference.peak else "–",
        )
    cost.caption = "peak memory beyond weights and input; a training step is forward, backward and AdamW"
    console.print(cost)
    if not comparison.on_kernels:
        console.print("[yellow]No kernel of ours served this: both sides ran the same plain PyTorch.[/]")
        for op, verdicts in comparison.served.items():
            for backend, verdict in verdicts.items():
                console.print(f"  {op}, {backend}: {verdict}", highlight=False, markup=False)


def console() -> Console:
    """The terminal, or a file of 120 columns: there rich would take 80, and cut tables."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


def count(number: int) -> str:
    """``1234567`` is ``1.2 M``, ``34567`` is ``34.6 thousand``."""
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.1f} thousand"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _megabytes(measurement: Measurement) -> str:
    return "not told" if measurement.peak is None else f"{measurement.peak / 2**20:,.0f} MB"
