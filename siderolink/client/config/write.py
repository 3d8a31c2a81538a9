"""Writes kernel arguments and documents that make a machine join a given server."""

from dataclasses import dataclass, field
from ipaddress import IPv6Address

import yaml

from siderolink.client.config.kernel_args import EVENT_SINK_ARGUMENT, KERNEL_LOG_ARGUMENT, URL_ARGUMENT
from siderolink.client.config.settings import LogURL
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL

KERNEL_LOG_NAME = "siderolink-kmsg"
TRUSTED_ROOTS_NAME = "siderolink-roots"


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinParameters:
    """A server's parameters for its machines."""

    url: JoinURL
    event_sink: HostPort | None = None
    kernel_log: LogURL | None = None
    roots_pem: str | None = field(default=None, repr=False)
    """Certificates to trust in addition to the system's; only documents can contain them."""


def on_overlay(
    url: JoinURL, server: IPv6Address, event_sink_port: int | None, log_port: int | None, roots_pem: str | None = None
) -> JoinParameters:
    """The parameters of a server that receives events and logs at its overlay address, on the given ports."""
    return JoinParameters(
        url=url,
        event_sink=HostPort(str(server), event_sink_port) if event_sink_port else None,
        kernel_log=LogURL("tcp", HostPort(str(server), log_port)) if log_port else None,
        roots_pem=roots_pem,
    )


def kernel_arguments(parameters: JoinParameters) -> str:
    """One line for a boot loader, join token included."""
    arguments = [(URL_ARGUMENT, parameters.url.encode())]
    if parameters.event_sink is not None:
        arguments.append((EVENT_SINK_ARGUMENT, str(parameters.event_sink)))
    if parameters.kernel_log is not None:
        arguments.append((KERNEL_LOG_ARGUMENT, str(parameters.kernel_log)))
    return " ".join(f"{name}={value}" for name, value in arguments)


def machine_documents(parameters: JoinParameters) -> str:
    """A stream of documents, join token included."""
    bodies: list[dict[str, str]] = [{"kind": "SideroLinkConfig", "apiUrl": parameters.url.encode()}]
    if parameters.event_sink is not None:
        bodies.append({"kind": "EventSinkConfig", "endpoint": str(parameters.event_sink)})
    if parameters.kernel_log is not None:
        bodies.append({"kind": "KmsgLogConfig", "name": KERNEL_LOG_NAME, "url": str(parameters.kernel_log)})
    if parameters.roots_pem is not None:
        bodies.append({"kind": "TrustedRootsConfig", "name": TRUSTED_ROOTS_NAME, "certificates": parameters.roots_pem})
    documents = [{"apiVersion": "v1alpha1"} | body for body in bodies]
    return str(yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=10**6))


class _Dumper(yaml.SafeDumper):
    """Represent text of several lines as a block."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
