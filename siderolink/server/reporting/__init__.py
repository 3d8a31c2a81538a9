"""Receiving what machines report over the overlay: events and kernel log lines."""

from siderolink.server.reporting.model import (
    LinesDropped,
    LogLine,
    MachineEvent,
    ReportDrop,
    ReportOptions,
    ReportsLost,
)
from siderolink.server.reporting.reports import Reports, receive_reports

__all__ = [
    "LinesDropped",
    "LogLine",
    "MachineEvent",
    "ReportDrop",
    "ReportOptions",
    "Reports",
    "ReportsLost",
    "receive_reports",
]
