"""Receiving what machines report over the overlay: events and kernel log lines."""

from siderolink.server.reporting.options import ReportOptions
from siderolink.server.reporting.receiver import Reports, receive_reports
from siderolink.server.reporting.reports import (
    LinesDropped,
    LogLine,
    MachineEvent,
    ReportDrop,
    ReportsLost,
)

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
