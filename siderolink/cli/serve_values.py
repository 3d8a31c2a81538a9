"""The value types of `serve`'s settings in a file: validated texts, paths, ports, and limits by name."""

from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from siderolink.common.errors import ConfigurationError
from siderolink.common.grpc import Limits, parse_networks
from siderolink.common.hostport import HostPort, is_loopback
from siderolink.server import MachineLimits, ReportOptions

_OWN_OPTION = {"max_connections_per_address"}
_CLIENTS_OWN = {"client_ping_interval", "connect_timeout", "ipv6_source_bits"}


def kebab(name: str) -> str:
    """The key of a field: ``api-listen``."""
    return name.replace("_", "-")


class SettingsPart(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, hide_input_in_errors=True, alias_generator=kebab, populate_by_name=True
    )


def _bounds(default: Any, name: str) -> dict[str, Any]:
    if name.endswith("_per_second"):
        return {"ge": 0}
    if isinstance(default, int):
        return {"ge": 1}
    return {"ge": 0, "le": 1} if name == "crowded_from" else {"gt": 0}


def _of_dataclass(kind: type, name: str, *, without: set[str]) -> type[SettingsPart]:
    """A model of a dataclass of numbers; missing values keep its defaults."""
    found: dict[str, Any] = {}
    for field in fields(kind):
        if field.name not in without and field.default is not MISSING and field.default is not None:
            number = int if isinstance(field.default, int) else float
            found[field.name] = (number | None, Field(None, **_bounds(field.default, field.name)))
    return create_model(name, __base__=SettingsPart, **found)


LimitKeys = _of_dataclass(MachineLimits, "LimitKeys", without=set())
ApiLimitKeys = _of_dataclass(Limits, "ApiLimitKeys", without=_OWN_OPTION | _CLIENTS_OWN)
ReportLimitKeys = _of_dataclass(ReportOptions, "ReportLimitKeys", without={"event_sink_port", "log_port"})


def listed(value: object) -> object:
    """A single text stands for a list of one."""
    return [value] if isinstance(value, str) else value


def is_host_port(text: str, *, port_zero: bool) -> str:
    HostPort.parse(text, port_zero=port_zero)
    return text


def is_on_loopback(text: str) -> bool:
    """Whether a host and port are on the loopback."""
    return is_loopback(HostPort.parse(text, port_zero=True).host)


def is_listen(text: str) -> str:
    """``HOST:PORT``, or ``PORT`` on the loopback."""
    HostPort.parse(full_listen(text), port_zero=True)
    return text


def full_listen(text: str) -> str:
    """``HOST:PORT`` for a value accepted by `is_listen`."""
    digits = text.removeprefix(":")
    return f"127.0.0.1:{digits}" if digits.isascii() and digits.isdigit() else text


def are_networks(texts: list[str], option: str) -> list[str]:
    parse_networks(texts, option)
    return texts


def are_ports(texts: list[str]) -> list[str]:
    from siderolink.server.fleet.overlay_ports import OverlayPort

    if "none" in texts and len(texts) > 1:
        raise ConfigurationError("give overlay ports, or none, not both")
    for text in texts:
        if text != "none":
            OverlayPort.parse(text)
    return texts


def written_as_text(value: object) -> object:
    """Accept ports given as numbers."""
    return [str(item) if type(item) is int else item for item in value] if isinstance(value, list) else value


def number_as_text(value: object) -> object:
    return str(value) if type(value) is int else value


HostAndPort = Annotated[str, AfterValidator(partial(is_host_port, port_zero=True))]
Listen = Annotated[str, BeforeValidator(number_as_text), AfterValidator(is_listen)]
LAX = Field(strict=False)
"""Paths and choices are text in a file."""
FilePath = Annotated[Path, LAX]
PortOrNone = Annotated[int, Field(ge=0, le=65535)]


def networks(option: str) -> Any:
    return Annotated[list[str], BeforeValidator(listed), AfterValidator(partial(are_networks, option=option))]


def option(default: Any, text: str, panel: str, **more: Any) -> Any:
    """A field: its default, help text, help panel, and further properties of its option.

    ``metavar`` is the value's placeholder, ``shown`` describes a default determined at run time, ``only_on`` marks a switch
    without a negative form, ``secret`` a value that is never shown.
    """
    return Field(default, description=text, repr="secret" not in more, json_schema_extra={"panel": panel, **more})
