"""Receives machines' reports over the overlay: events and kernel log lines."""

from siderolink.server.reporting.model import (
    KeepOptions,
    KernelLine,
    LinesDropped,
    LogLine,
    MachineEvent,
    ReportDrop,
    ReportedEvent,
    ReportOptions,
    ReportsLost,
)
from siderolink.server.reporting.reports import Reports, receive_reports
from siderolink.server.reporting.search import ReportQuery

__all__ = [
    "KeepOptions",
    "KernelLine",
    "LinesDropped",
    "LogLine",
    "MachineEvent",
    "ReportDrop",
    "ReportOptions",
    "ReportQuery",
    "ReportedEvent",
    "Reports",
    "ReportsLost",
    "receive_reports",
]
