"""The three commands that every GAN has: a model's ``cli.py`` says of which model, and with what defaults.

The fields of a model's configuration and of a recipe are options. So commands get their signatures here, for typer to
read; and annotations are evaluated as they are met, for some name what only this function knows.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import torch
import typer
from typer import Option

from .. import report
from ..atomic import writable
from ..commands import (
    RESUMABLE,
    Backend,
    Device,
    Dtype,
    JsonPath,
    Out,
    Repetitions,
    Resume,
    SaveEvery,
    Seed,
    Steps,
    check_comparison,
    check_device,
    checkpoint_path,
    compare_and_show,
    follow,
)  # fmt: skip
from .data import open_images
from .model import Config, Gan
from .ranks import joined
from .training import Recipe, Training, load_model

Command = Callable[..., None]
SettingsT = TypeVar("SettingsT", Config, Recipe)


def train_command(gan: type[Gan], config: Config, *, steps: int, recipe: Recipe | None = None) -> Command:
    """``train``: ``config`` and ``recipe``, or ``gan.recipe``, are the defaults of its options."""
    defaults = gan.recipe if recipe is None else recipe

    def train(
        ctx: typer.Context,
        out: Out = Path("runs") / gan.name,
        steps: Steps = steps,
        resume: Resume = False,
        save_every: SaveEvery = 250,
        device: Device = "cpu",
        **settings: Any,
    ) -> None:
        console = report.console()
        check_device(device)
        resumable = {*RESUMABLE, "device"}
        path = checkpoint_path(ctx, out, steps=steps, save_every=save_every, resume=resume, resumable=resumable)
        with joined(device) as device:
            if resume:
                run = Training.resumed(gan, path, device)
            else:
                asked = chosen(defaults, settings)
                run = Training.begun(gan, fitted(chosen(config, settings), asked), asked, device)
            if run.ranks.rank:
                for _ in run.run(steps):  # the first rank tells of it and saves it
                    pass
                return
            run.pictures = out / "samples"
            counts = [report.count(sum(p.numel() for p in network.parameters())) for network in run.networks.values()]
            known = f"{run.gan.config.classes} classes" if run.gan.config.classes else "no classes"
            console.print(f"{gan.title}: generator {counts[0]} parameters, discriminator {counts[1]}, {known}")
            follow(run, path, steps=steps, save_every=save_every, console=console)

    doc = f"Train {gan.title} on digits, a folder of images or LSUN, with losses and images a second."
    return _with_options(train, doc, config, defaults)


def sample_command(gan: type[Gan]) -> Command:
    """``sample``: a PNG of any of ``gan.pictures()``."""
    from .pictures import Request

    names = list(gan.pictures())

    def sample(
        checkpoint: Annotated[Path, Option(help="What `train` wrote.")],
        picture: Annotated[str, Option(help=", ".join(names))] = names[0],
        out: Annotated[Path, Option(help="The PNG to write.")] = Path("runs") / f"{gan.name}.png",
        rows: Annotated[int, Option(help="Rows of images.")] = 8,
        columns: Annotated[int, Option(help="Images in a row.")] = 10,
        label: Annotated[int | None, Option(help="The number of a class; all of them by default.")] = None,
        truncation: Annotated[float | None, Option(help="Less variety for more fidelity; none by default.")] = None,
        device: Device = "cpu",
        seed: Seed = 0,
    ) -> None:
        from .grids import write_grid

        check_device(device)
        if picture not in names:
            raise ValueError(f"picture must be one of {', '.join(names)}, got {picture!r}")
        if rows < 1 or columns < 1:
            raise ValueError(f"rows and columns must be at least 1, got {rows} and {columns}")
        if truncation is not None:
            gan.check_truncation(truncation)
        model = load_model(gan, checkpoint, device)
        if label is not None and not 0 <= label < model.config.classes:
            known = f"from 0 to {model.config.classes - 1}" if model.config.classes else "left out for want of classes"
            raise ValueError(f"label must be {known}, got {label}")
        writable(out)
        torch.manual_seed(seed)
        images, wide = gan.pictures()[picture](model, Request(rows, columns, label, truncation, seed))
        write_grid(out, images, wide)
        report.console().print(f"{len(images)} images in {out}", soft_wrap=True)

    if not gan.truncates:
        sample = _without(sample, "truncation")
    sample.__doc__ = f"Draw with a trained {gan.title}: a PNG of samples, or of what lies between them."
    return sample


def compare_command(gan: type[Gan], config: Config, *, batch: int) -> Command:
    """``compare``: ``config`` and ``batch`` are the defaults of its options."""

    def compare(
        data: Annotated[str, Option(help="digits, a folder of images, or the folder of an LSUN LMDB.")] = "digits",
        grey: Annotated[bool, Option(help="Read images in one channel. Digits have no other.")] = False,
        conditional: Annotated[bool, Option(help="Let the model know the classes of the data.")] = (
            gan.recipe.conditional
        ),
        batch: Annotated[int, Option(help="Images.")] = batch,
        dtype: Dtype = "float32",
        device: Device = "cpu",
        backend: Backend = "auto",
        repetitions: Repetitions = 3,
        seed: Seed = 0,
        json_path: JsonPath = None,
        **settings: Any,
    ) -> None:
        from .comparison import problem, real_images

        wanted = check_comparison(dtype=dtype, device=device, backend=backend, json_path=json_path)
        recipe = replace(gan.recipe, data=data, grey=grey, conditional=conditional)
        shape = fitted(chosen(config, settings), recipe)
        real = real_images(data, shape, batch, grey=grey, conditional=conditional, seed=seed)
        compare_and_show(
            partial(problem, gan, shape, real, wanted, device, seed),
            f"{gan.title}: {{parameters}}, {batch} images of {shape.size}×{shape.size}, {dtype}",
            {"model": gan.name, "config": vars(shape), "batch": batch},
            dtype=wanted, device=device, backend=backend, repetitions=repetitions, json_path=json_path,
            kinks=True,
        )  # fmt: skip

    doc = f"Run a step of {gan.title} with our kernels and in plain PyTorch. Exits with 1 if the numbers differ."
    found = _with_options(compare, doc, config)
    return found if "conditional" in _options(gan.recipe) else _without(found, "conditional")


def fitted(config: Config, recipe: Recipe) -> Config:
    """A configuration with the channels and classes of the data."""
    images = open_images(recipe.data, config.size, grey=recipe.grey)
    return replace(config, channels=images.channels, classes=len(images.classes) if recipe.conditional else 0)


def chosen(defaults: SettingsT, settings: dict[str, Any]) -> SettingsT:
    """``defaults`` with those of ``settings`` that are its options."""
    return replace(defaults, **{name: settings[name] for name in _options(defaults)})


def _options(defaults: Config | Recipe) -> dict[str, Any]:
    """The types, as typer wants them, of the fields that are options."""
    hints = get_type_hints(type(defaults), include_extras=True)
    annotated = ((field.name, hints[field.name]) for field in fields(defaults))
    return {name: hint for name, hint in annotated if len(get_args(hint)) > 1 and hasattr(hint, "__metadata__")}


def _with_options(command: Command, doc: str, *defaults: Config | Recipe) -> Command:
    """A command whose ``**settings`` are the options of ``defaults``, as typer reads signatures."""
    found = dict(inspect.signature(command).parameters)
    found.pop("settings")
    for settings in defaults:
        for name, hint in _options(settings).items():
            found[name] = inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=getattr(settings, name), annotation=hint
            )
    return _signed(command, list(found.values()), doc)


def _without(command: Command, name: str) -> Command:
    """A command that lacks an option, whose default it takes."""
    found = inspect.signature(command).parameters
    return _signed(command, [parameter for parameter in found.values() if parameter.name != name], command.__doc__)


def _signed(command: Command, parameters: list[inspect.Parameter], doc: str | None) -> Command:
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = doc
    return command
