"""The manager's side: a server that machines join."""

from siderolink.server.admission.authorization import Allow, Authorize, Deny, JoinRequest
from siderolink.server.events import (
    EventsLost,
    EventStream,
    HandshakeCompleted,
    JoinRefused,
    LeaveReason,
    LinkDown,
    MachineJoined,
    MachineLeft,
    ServerEvent,
)
from siderolink.server.fleet.links import LinkState
from siderolink.server.fleet.machine_api import open_machine_api
from siderolink.server.options import MachineLimits
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
from siderolink.server.store import Machine, MemoryStore, Store

__all__ = [
    "Allow",
    "Authorize",
    "Deny",
    "EventStream",
    "EventsLost",
    "HandshakeCompleted",
    "JoinRefusal",
    "JoinRefused",
    "JoinRequest",
    "LeaveReason",
    "LinesDropped",
    "LinkDown",
    "LinkState",
    "LogLine",
    "Machine",
    "MachineEvent",
    "MachineJoined",
    "MachineLeft",
    "MachineLimits",
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
    "open_machine_api",
]
