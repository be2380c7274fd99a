"""``python -m models list | compare | train | sample MODEL``."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.table import Table

from . import report
from .compare import SideFailed
from .memory import keep_freed_memory
from .registry import COMMANDS, MODELS


def list_models() -> None:
    """List the models and what each can do."""
    table = Table("model", "", "from", "commands")
    for model in MODELS:
        table.add_row(model.name, model.about, model.source, ", ".join(c for c in COMMANDS if model.command(c)))
    report.console().print(table)


def application() -> typer.Typer:
    app = typer.Typer(
        name="python -m models", help="The reference models of gdl_kernels.", no_args_is_help=True, add_completion=False
    )
    app.command("list")(list_models)
    for name, about in COMMANDS.items():
        group = typer.Typer(help=about, no_args_is_help=True)
        for model in MODELS:
            if function := model.command(name):
                group.command(model.name)(function)
        app.add_typer(group, name=name)
    return app


def main() -> None:
    """Run the command line. What the user can mend is said in a line; a traceback is a fault of ours."""
    keep_freed_memory()
    try:
        application()()
    except (ValueError, SideFailed) as error:
        sys.exit(_failed(str(error)))
    except OSError as error:
        sys.exit(_failed(": ".join(str(part) for part in (error.filename, error.strerror or error) if part)))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("gdl_kernels", "models"):
            raise
        sys.exit(_failed(f"{error.name} is not installed; the models need: pip install -e '.[models]'"))


def _failed(message: str) -> int:
    Console(stderr=True).print("[bold red]error:[/]", end=" ")
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(message)
    return 2


if __name__ == "__main__":
    main()
