"""The server (manager) that machines join."""

from siderolink.common.wireguard.device import DeviceCounters, InterfaceCounters
from siderolink.server.admission.limits import MachineLimits
from siderolink.server.admission.policy import JoinPolicy, JoinTokensMode
from siderolink.server.admission.request import Allow, Authorize, Deny, JoinRequest
from siderolink.server.counters import HealthCheck, MachineGroup, ReportCounters, ServerCounters, Transport
from siderolink.server.events import (
    AdmissionChanged,
    ClaimRefused,
    DownReason,
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
from siderolink.server.history import History, HistoryCounters, HistoryOptions
from siderolink.server.refusals import JoinRefusal, StreamRefusal
from siderolink.server.reporting import (
    KeepOptions,
    KernelLine,
    LinesDropped,
    LogLine,
    MachineEvent,
    ReportDrop,
    ReportedEvent,
    ReportOptions,
    ReportQuery,
    Reports,
    ReportsLost,
)
from siderolink.server.server import MachineStatus, Server
from siderolink.server.store import Ban, BanKind, HistoryEntry, HistoryKind, Machine, MachineAdmission, MemoryStore, Store
from siderolink.server.store.measured import StoreCounters

__all__ = [
    "AdmissionChanged",
    "Allow",
    "Authorize",
    "Ban",
    "BanKind",
    "ClaimRefused",
    "Deny",
    "DeviceCounters",
    "DownReason",
    "EventStream",
    "EventsLost",
    "HandshakeCompleted",
    "HealthCheck",
    "History",
    "HistoryCounters",
    "HistoryEntry",
    "HistoryKind",
    "HistoryOptions",
    "InterfaceCounters",
    "JoinPolicy",
    "JoinRefusal",
    "JoinRefused",
    "JoinRequest",
    "JoinTokensMode",
    "KeepOptions",
    "KernelLine",
    "LeaveReason",
    "LinesDropped",
    "LinkDown",
    "LinkState",
    "LogLine",
    "Machine",
    "MachineAdmission",
    "MachineEvent",
    "MachineGroup",
    "MachineJoined",
    "MachineLeft",
    "MachineLimits",
    "MachineRekeyed",
    "MachineStatus",
    "MemoryStore",
    "ReportCounters",
    "ReportDrop",
    "ReportOptions",
    "ReportQuery",
    "ReportedEvent",
    "Reports",
    "ReportsLost",
    "Server",
    "ServerCounters",
    "ServerEvent",
    "Store",
    "StoreCounters",
    "StreamRefusal",
    "Transport",
    "UniqueTokenBound",
    "open_machine_api",
]
