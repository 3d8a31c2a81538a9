"""Machine settings from configuration documents and the kernel command line.

    settings = Sources(documents=(Path("machine.yaml"),)).read()
    async with connect(settings.url.value, tls=settings.tls()) as link: ...

Documents need the extra ``siderolink[config]``; the kernel command line does not.
"""

from siderolink.client.config.kernel_args import PROC_CMDLINE, parse_kernel_arguments, read_kernel_arguments
from siderolink.client.config.settings import Ingress, IngressRule, LogURL, MachineSettings, PortRange, Setting, merge
from siderolink.client.config.sources import HOST_DOCUMENTS, Sources

__all__ = [
    "HOST_DOCUMENTS",
    "PROC_CMDLINE",
    "Ingress",
    "IngressRule",
    "LogURL",
    "MachineSettings",
    "PortRange",
    "Setting",
    "Sources",
    "merge",
    "parse_kernel_arguments",
    "read_kernel_arguments",
]
