"""The documents that concern SideroLink, as existing machines accept them."""

from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from siderolink.client.config.settings import LogURL, PortRange, read_ports, read_subnet
from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL

MAX_TEXT = 8192
MAX_PORTS = 64
MAX_SUBNETS = 256
MAX_CERTIFICATES = 512

Subnet: TypeAlias = IPv4Network | IPv6Network


def _api_url(text: str) -> str:
    if not text.lower().startswith(("https://", "grpc://")):
        raise ConfigurationError("cannot use this join URL: in a document it must begin with https:// or grpc://")
    JoinURL.parse(text)
    return text


def _endpoint(text: str) -> str:
    HostPort.parse(text)
    return text


def _log_url(text: str) -> str:
    LogURL.parse(text)
    return text


def _certificates(text: str) -> str:
    try:
        found = x509.load_pem_x509_certificates(text.encode())
    except ValueError:
        raise ConfigurationError("must be certificates in PEM form") from None
    if len(found) > MAX_CERTIFICATES:
        raise ConfigurationError(f"a document has at most {MAX_CERTIFICATES} certificates")
    # text between the certificates is dropped
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in found)


def _name(text: str) -> str:
    if not text.isprintable():
        raise ConfigurationError("a name may contain only printable characters")
    return text


def _ports(ports: list[PortRange]) -> list[PortRange]:
    ordered = sorted(ports)
    for before, after in zip(ordered, ordered[1:], strict=False):
        if after.first <= before.last:
            raise ConfigurationError(f"the port ranges {before} and {after} overlap")
    return ports


Text = Annotated[str, Field(max_length=MAX_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=253), AfterValidator(_name)]


class Section(BaseModel):
    """Base of all documents and their parts. Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class Document(Section):
    """A document. A kind without names allows only one document."""

    KIND: ClassVar[str]
    ESSENTIAL: ClassVar[frozenset[str]]
    """Keys without which the document means nothing."""
    FALLBACKS: ClassVar[dict[str, str]] = {}
    """Replaces an unusable key whose omission would be unsafe."""

    @classmethod
    def without(cls, value: dict[str, Any], location: tuple[int | str, ...]) -> dict[str, Any]:
        """A copy of the document without the key at fault."""
        return {key: inner for key, inner in value.items() if key != location[0]}

    api_version: Literal["v1alpha1"] = Field(alias="apiVersion")


class SideroLinkConfig(Document):
    KIND: ClassVar = "SideroLinkConfig"
    ESSENTIAL: ClassVar = frozenset({"apiUrl"})

    kind: Literal["SideroLinkConfig"]
    api_url: Annotated[Text, AfterValidator(_api_url)] = Field(alias="apiUrl", repr=False)
    unique_token: Text = Field(default="", alias="uniqueToken", repr=False)


class EventSinkConfig(Document):
    KIND: ClassVar = "EventSinkConfig"
    ESSENTIAL: ClassVar = frozenset({"endpoint"})

    kind: Literal["EventSinkConfig"]
    endpoint: Annotated[Text, AfterValidator(_endpoint)]


class KmsgLogConfig(Document):
    KIND: ClassVar = "KmsgLogConfig"
    ESSENTIAL: ClassVar = frozenset({"url"})

    kind: Literal["KmsgLogConfig"]
    name: Name
    url: Annotated[Text, AfterValidator(_log_url)]


class TrustedRootsConfig(Document):
    KIND: ClassVar = "TrustedRootsConfig"
    ESSENTIAL: ClassVar = frozenset({"certificates"})

    kind: Literal["TrustedRootsConfig"]
    name: Name
    certificates: Annotated[str, AfterValidator(_certificates)] = Field(repr=False)


class NetworkDefaultActionConfig(Document):
    KIND: ClassVar = "NetworkDefaultActionConfig"
    ESSENTIAL: ClassVar = frozenset[str]()
    FALLBACKS: ClassVar = {"ingress": "block"}

    kind: Literal["NetworkDefaultActionConfig"]
    ingress: Literal["accept", "block"] = "accept"


class PortSelector(Section):
    ports: Annotated[
        list[Annotated[PortRange, PlainValidator(read_ports)]],
        Field(min_length=1, max_length=MAX_PORTS),
        AfterValidator(_ports),
    ]
    protocol: Literal["tcp", "udp", "icmp", "icmpv6"]


class IngressEntry(Section):
    subnet: Annotated[Subnet, PlainValidator(read_subnet)]
    except_: Annotated[Subnet, PlainValidator(read_subnet)] | None = Field(default=None, alias="except")


class NetworkRuleConfig(Document):
    KIND: ClassVar = "NetworkRuleConfig"
    ESSENTIAL: ClassVar = frozenset({"portSelector"})

    kind: Literal["NetworkRuleConfig"]
    name: Name
    port_selector: PortSelector = Field(alias="portSelector")
    ingress: Annotated[list[IngressEntry], Field(max_length=MAX_SUBNETS)] = []

    @classmethod
    def without(cls, value: dict[str, Any], location: tuple[int | str, ...]) -> dict[str, Any]:
        """A copy that is never more permissive than intended: drops unusable entries entirely, or all entries."""
        found = {key: inner for key, inner in value.items() if key != location[0]}
        entries = value.get("ingress")
        if location[0] == "ingress" and len(location) > 1 and isinstance(entries, list):
            return found | {"ingress": [entry for place, entry in enumerate(entries) if place != location[1]]}
        return found | {"ingress": []} if location[0] not in ("apiVersion", "name") else found


MODELS: dict[str, type[Document]] = {
    model.KIND: model
    for model in (
        SideroLinkConfig,
        EventSinkConfig,
        KmsgLogConfig,
        TrustedRootsConfig,
        NetworkDefaultActionConfig,
        NetworkRuleConfig,
    )
}
