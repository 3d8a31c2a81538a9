"""The resource types of a machine: full name, aliases, table columns, and who may read them."""

from dataclasses import dataclass

from siderolink.client.maintenance.resources.spec import ResourceSpec
from siderolink.common.pb.cosi.resource.meta import (
    NamespaceSpec,
    ResourceDefinitionSpec,
    ResourceDefinitionSpecPrintColumn,
    ResourceDefinitionSpecSensitivity,
)

META = "meta"
"""The namespace of resources about resources."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceType:
    """A resource type."""

    name: str
    """The full name: a plural in CamelCase, a dot and a domain."""
    singular: str
    """The singular, for people."""
    namespace: str
    """The default namespace."""
    aliases: tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    """Titles and JSON paths of a table's columns."""
    is_sensitive: bool = False
    """Whether only an admin may read it."""

    @property
    def id(self) -> str:
        """The id of its definition."""
        return self.name.lower()

    @property
    def short_names(self) -> tuple[str, ...]:
        """Aliases, singular, and initials, as clients expect them."""
        plural = self.name.partition(".")[0]
        capitals = "".join(letter for letter in plural if letter.isupper()).lower()
        names = [*self.aliases, self.singular.lower()]
        if len(capitals) > 1:
            names.append(capitals)
            if not capitals.endswith("s"):
                names.append(f"{capitals}s")
        return tuple(names)

    @property
    def all_names(self) -> tuple[str, ...]:
        """All names other than the full one."""
        plural, *domain = self.name.lower().split(".")
        partial = (".".join((plural, *domain[:count])) for count in range(len(domain)))
        return (*partial, *self.short_names)

    def definition(self) -> ResourceSpec:
        """The definition, which clients read first."""
        sensitivity = ResourceDefinitionSpecSensitivity
        spec = ResourceDefinitionSpec(
            resource_type=self.name,
            display_type=self.singular,
            default_namespace=self.namespace,
            aliases=list(self.short_names),
            all_aliases=list(self.all_names),
            print_columns=[ResourceDefinitionSpecPrintColumn(name=name, json_path=path) for name, path in self.columns],
            sensitivity=sensitivity.SENSITIVE if self.is_sensitive else sensitivity.NON_SENSITIVE,
        )
        fields: dict[str, object] = {
            "type": self.name,
            "displayType": self.singular,
            "defaultNamespace": self.namespace,
            "aliases": list(self.short_names),
            "allAliases": list(self.all_names),
            "printColumns": [{"name": name, "jsonPath": path} for name, path in self.columns],
        }
        if self.is_sensitive:
            fields["sensitivity"] = "sensitive"
        return ResourceSpec(bytes(spec), fields)


def namespace_spec(description: str) -> ResourceSpec:
    return ResourceSpec(bytes(NamespaceSpec(description=description)), {"description": description})


RESOURCE_DEFINITION = ResourceType(
    name="ResourceDefinitions.meta.cosi.dev",
    singular="ResourceDefinition",
    namespace=META,
    aliases=("api-resources",),
    columns=(("Aliases", "{.aliases[:]}"),),
)
NAMESPACE = ResourceType(name="Namespaces.meta.cosi.dev", singular="Namespace", namespace=META, aliases=("ns",))


def _type(
    name: str,
    singular: str,
    namespace: str,
    *columns: tuple[str, str],
    aliases: tuple[str, ...] = (),
    is_sensitive: bool = False,
) -> ResourceType:
    paths = tuple((title, f"{{.{path}}}") for title, path in columns)
    return ResourceType(
        name=name, singular=singular, namespace=namespace, aliases=aliases, columns=paths, is_sensitive=is_sensitive
    )


LINK_STATUS = _type(
    "LinkStatuses.net.talos.dev",
    "LinkStatus",
    "network",
    ("Alias", "alias"),
    ("Type", "type"),
    ("Kind", "kind"),
    ("Hw Addr", "hardwareAddr"),
    ("Oper State", "operationalState"),
    ("Link State", "linkState"),
    aliases=("link", "links"),
)
ADDRESS_STATUS = _type(
    "AddressStatuses.net.talos.dev",
    "AddressStatus",
    "network",
    ("Address", "address"),
    ("Link", "linkName"),
    aliases=("address", "addresses"),
)
ROUTE_STATUS = _type(
    "RouteStatuses.net.talos.dev",
    "RouteStatus",
    "network",
    ("Destination", "dst"),
    ("Gateway", "gateway"),
    ("Link", "outLinkName"),
    ("Metric", "priority"),
    aliases=("route", "routes"),
)
NODE_ADDRESS = _type("NodeAddresses.net.talos.dev", "NodeAddress", "network", ("Addresses", "addresses"))
HOSTNAME_STATUS = _type(
    "HostnameStatuses.net.talos.dev",
    "HostnameStatus",
    "network",
    ("Hostname", "hostname"),
    ("Domainname", "domainname"),
    aliases=("hostname",),
)
SYSTEM_INFORMATION = _type(
    "SystemInformations.hardware.talos.dev",
    "SystemInformation",
    "hardware",
    ("Manufacturer", "manufacturer"),
    ("ProductName", "productName"),
    ("Version", "version"),
    ("SerialNumber", "serialnumber"),
    ("UUID", "uuid"),
    ("WakeUpType", "wakeUpType"),
    ("SKUNumber", "skuNumber"),
)
PROCESSOR = _type(
    "Processors.hardware.talos.dev",
    "Processor",
    "hardware",
    ("Manufacturer", "manufacturer"),
    ("Model", "productName"),
    ("Cores", "coreCount"),
    ("Threads", "threadCount"),
    aliases=("cpus", "cpu"),
)
MEMORY_MODULE = _type(
    "MemoryModules.hardware.talos.dev",
    "MemoryModule",
    "hardware",
    ("Manufacturer", "manufacturer"),
    ("Model", "productName"),
    ("SizeMiB", "sizeMiB"),
    aliases=("ram",),
)
PLATFORM_METADATA = _type(
    "PlatformMetadatas.talos.dev",
    "PlatformMetadata",
    "runtime",
    ("Platform", "platform"),
    ("Type", "instanceType"),
    ("Region", "region"),
    ("Zone", "zone"),
)
META_KEY = _type("MetaKeys.runtime.talos.dev", "MetaKey", "runtime", ("Value", "value"), aliases=("meta",))
UNIQUE_TOKEN = _type("UniqueMachineTokens.runtime.talos.dev", "UniqueMachineToken", "runtime", ("Token", "token"))
EXTENSION_STATUS = _type(
    "ExtensionStatuses.runtime.talos.dev",
    "ExtensionStatus",
    "runtime",
    ("Name", "metadata.name"),
    ("Version", "metadata.version"),
    aliases=("extensions",),
)
MACHINE_STATUS = _type(
    "MachineStatuses.runtime.talos.dev", "MachineStatus", "runtime", ("Stage", "stage"), ("Ready", "status.ready")
)
VERSION = _type("Versions.runtime.talos.dev", "Version", "runtime", ("Version", "version"))
SECURITY_STATE = _type(
    "SecurityStates.talos.dev", "SecurityState", "runtime", ("SecureBoot", "secureBoot"), ("SELinux", "selinuxState")
)
DIAGNOSTIC = _type("Diagnostics.runtime.talos.dev", "Diagnostic", "runtime", ("Message", "message"), ("Details", "details"))
KERNEL_CMDLINE = _type("KernelCmdlines.runtime.talos.dev", "KernelCmdline", "runtime", ("Cmdline", "cmdline"))
DISK = _type(
    "Disks.block.talos.dev",
    "Disk",
    "runtime",
    ("Size", "pretty_size"),
    ("Read Only", "readonly"),
    ("Transport", "transport"),
    ("Rotational", "rotational"),
    ("WWID", "wwid"),
    ("Model", "model"),
    ("Serial", "serial"),
)
SYSTEM_DISK = _type("SystemDisks.block.talos.dev", "SystemDisk", "runtime", ("Disk", "diskID"))
MEMBER = _type(
    "Members.cluster.talos.dev",
    "Member",
    "cluster",
    ("Hostname", "hostname"),
    ("Machine Type", "machineType"),
    ("OS", "operatingSystem"),
    ("Addresses", "addresses"),
)
SIDEROLINK_STATUS = _type(
    "SiderolinkStatuses.siderolink.talos.dev", "SiderolinkStatus", "config", ("Host", "host"), ("Connected", "connected")
)
LINK_SPEC = _type("LinkSpecs.net.talos.dev", "LinkSpec", "network", is_sensitive=True)
SIDEROLINK_CONFIG = _type(
    "SiderolinkConfigs.siderolink.talos.dev",
    "SiderolinkConfig",
    "config",
    ("API Endpoint", "apiEndpoint"),
    ("Tunnel", "tunnel"),
    is_sensitive=True,
)
SIDEROLINK_TUNNEL = _type(
    "SiderolinkTunnels.siderolink.talos.dev",
    "SiderolinkTunnel",
    "config",
    ("API Endpoint", "apiEndpoint"),
    ("Interface name", "linkName"),
    ("MTU", "mtu"),
    ("Node address", "nodeAddress"),
    is_sensitive=True,
)
MACHINE_CONFIG = _type("MachineConfigs.config.talos.dev", "MachineConfig", "config", is_sensitive=True)
OPERATOR_SPEC = _type("OperatorSpecs.net.talos.dev", "OperatorSpec", "network", is_sensitive=True)
DEVICE_CONFIG = _type("DeviceConfigSpecs.net.talos.dev", "DeviceConfigSpec", "network", is_sensitive=True)
EXTENSION_CONFIG = _type("ExtensionServiceConfigs.runtime.talos.dev", "ExtensionServiceConfig", "runtime", is_sensitive=True)
OOM_ACTION = _type("OOMActions.runtime.talos.dev", "OOMAction", "runtime", is_sensitive=True)

EMPTY_TYPES = (
    EXTENSION_STATUS,
    DIAGNOSTIC,
    SYSTEM_DISK,
    MEMBER,
    OPERATOR_SPEC,
    DEVICE_CONFIG,
    EXTENSION_CONFIG,
    OOM_ACTION,
)
"""Types that clients expect to be registered although this machine has no such resources."""

MACHINE_TYPES = (
    LINK_STATUS,
    ADDRESS_STATUS,
    ROUTE_STATUS,
    NODE_ADDRESS,
    HOSTNAME_STATUS,
    SYSTEM_INFORMATION,
    PROCESSOR,
    MEMORY_MODULE,
    PLATFORM_METADATA,
    META_KEY,
    UNIQUE_TOKEN,
    MACHINE_STATUS,
    VERSION,
    SECURITY_STATE,
    KERNEL_CMDLINE,
    DISK,
    SIDEROLINK_STATUS,
    LINK_SPEC,
    SIDEROLINK_CONFIG,
    SIDEROLINK_TUNNEL,
    MACHINE_CONFIG,
    *EMPTY_TYPES,
)
"""The types of every machine."""
