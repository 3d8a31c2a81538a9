"""The command `siderolink serve`, whose options are generated from the model of its settings."""

import inspect
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from siderolink.cli.options import with_parameters
from siderolink.cli.serve_config import ServeConfig, extra_of
from siderolink.cli.serve_layers import LIMIT_FIELDS, read_serve_config, variable
from siderolink.cli.serve_values import kebab

app = typer.Typer(add_completion=False)

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="File of settings (YAML). The environment overrides it, and arguments override both.",
        metavar="FILE",
        envvar="SIDEROLINK_CONFIG",
        show_envvar=False,
    ),
]
CheckConfig = Annotated[bool, typer.Option("--check-config", help="Check the settings, print the result, and serve nothing.")]


def _serve(context: typer.Context, config: ConfigFile = None, check_config: CheckConfig = False, **given: Any) -> None:
    """Run a server until stopped. Reloads the join token file and the certificate when they change, and on SIGHUP.

    Each option is also a key of the file that --config names, such as `api-listen`, and an environment variable, such as
    SIDEROLINK_API_LISTEN.
    """
    from siderolink.cli.logs import start_log
    from siderolink.cli.options import LogFormat

    def of(place: str) -> dict[str, Any]:
        return {name: value for name, value in given.items() if _place(context, name) == place}

    # a limit given as an argument does not discard other limits given by the environment
    limits = {name: os.environ.get(variable(name), "").split() for name in LIMIT_FIELDS}
    settings, layers = read_serve_config(config, of("ENVIRONMENT") | limits, of("COMMANDLINE"))
    if not check_config:
        start_log(settings.log_level, as_json=settings.log_format is LogFormat.JSON)
    from siderolink.cli.serve import check_serve, run_serve

    if check_config:
        check_serve(settings, layers)
    else:
        run_serve(settings)


def _place(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name


def _parameters() -> Iterator[inspect.Parameter]:
    for name, field in ServeConfig.model_fields.items():
        extra = extra_of(name)
        bounds = {key: value for part in field.metadata for key, value in _bounds(part)}
        kind = _kind(field)
        option = typer.Option(
            *_declarations(name, kind, extra),
            help=field.description,
            envvar=variable(name),
            show_envvar=False,
            metavar=extra.get("metavar"),
            rich_help_panel=str(extra["panel"]),
            show_default=_shown(field, extra),
            **bounds,
        )
        annotation = Annotated[list[str] | None if kind is list else kind | None, option]  # type: ignore[valid-type]
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _declarations(name: str, kind: type, extra: dict[str, Any]) -> list[str]:
    long = f"--{kebab(name)}"
    return [long] if kind is not bool or extra.get("only_on") else [f"{long}/--no-{kebab(name)}"]


def _kind(field: FieldInfo) -> type:
    """The option's type: text, number, flag, choice, path, or list of texts."""
    kind = field.annotation
    while get_origin(kind) is Annotated or NoneType in get_args(kind):
        kind = next(part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is list or not (isinstance(kind, type) and issubclass(kind, str | int | float | StrEnum | Path)):
        return list
    return kind


def _bounds(part: object) -> Iterator[tuple[str, Any]]:
    """The option's bounds from one item of a field's metadata."""
    for ours, theirs in (("min", "ge"), ("max", "le")):
        if (bound := getattr(part, theirs, None)) is not None:
            yield ours, bound


def _shown(field: FieldInfo, extra: dict[str, Any]) -> str | bool:
    """The default as shown in the help."""
    if "shown" in extra:
        return str(extra["shown"])
    return False if isinstance(field.default, bool) or field.default in (None, []) else str(field.default)


_own = [one for one in inspect.signature(_serve).parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
app.command("serve")(with_parameters(_serve, [*_own, *_parameters()]))
