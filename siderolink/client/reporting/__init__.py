"""Reporting to the server over the overlay: events and kernel log lines."""

from siderolink.client.reporting.event_sender import EventSender
from siderolink.client.reporting.kernel_log import KernelMessage, read_kernel_log
from siderolink.client.reporting.log_sender import LogDestination, LogSender, forward_log

__all__ = [
    "EventSender",
    "KernelMessage",
    "LogDestination",
    "LogSender",
    "forward_log",
    "read_kernel_log",
]
