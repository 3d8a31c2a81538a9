"""The manager's side: a server that machines join."""

from siderolink.server.admission.limits import MachineLimits
from siderolink.server.admission.policy import JoinPolicy, JoinTokensMode
from siderolink.server.admission.request import Allow, Authorize, Deny, JoinRequest
from siderolink.server.events import (
    AdmissionChanged,
    ClaimRefused,
    EventsLost,
    EventStream,
    HandshakeCompleted,
    JoinRefused,
    LeaveReason,
    LinkDown,
    MachineJoined,
    MachineLeft,
    MachineRekeyed,
    ServerEvent,
    UniqueTokenBound,
)
from siderolink.server.fleet.directory import LinkState
from siderolink.server.fleet.machine_api import open_machine_api
from siderolink.server.refusals import JoinRefusal, StreamRefusal
from siderolink.server.reporting import (
    LinesDropped,
    LogLine,
    MachineEvent,
    ReportDrop,
    ReportOptions,
    Reports,
    ReportsLost,
)
from siderolink.server.server import MachineStatus, Server
from siderolink.server.store import Ban, BanKind, Machine, MachineAdmission, MemoryStore, Store

__all__ = [
    "AdmissionChanged",
    "Allow",
    "Authorize",
    "Ban",
    "BanKind",
    "ClaimRefused",
    "Deny",
    "EventStream",
    "EventsLost",
    "HandshakeCompleted",
    "JoinPolicy",
    "JoinRefusal",
    "JoinRefused",
    "JoinRequest",
    "JoinTokensMode",
    "LeaveReason",
    "LinesDropped",
    "LinkDown",
    "LinkState",
    "LogLine",
    "Machine",
    "MachineAdmission",
    "MachineEvent",
    "MachineJoined",
    "MachineLeft",
    "MachineLimits",
    "MachineRekeyed",
    "MachineStatus",
    "MemoryStore",
    "ReportDrop",
    "ReportOptions",
    "Reports",
    "ReportsLost",
    "Server",
    "ServerEvent",
    "Store",
    "StreamRefusal",
    "UniqueTokenBound",
    "open_machine_api",
]
