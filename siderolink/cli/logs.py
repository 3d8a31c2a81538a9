"""The log of a long-running command: structured records, written by a separate thread.

    log_event(), logging  ->  LogHandler: level, sampling  ->  LineQueue: never blocks  ->  LineWriter: a thread, text or JSON

So a blocked or closed reader of standard output does not affect the service: a full queue drops and counts records, and a
closed pipe ends the log but not the program. docs/logs.md is the operator's page.
"""

import atexit
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any

import structlog

from siderolink.cli.journal import SOCKET, Journal, encode, is_journal
from siderolink.cli.output import LineWriter
from siderolink.cli.sampling import RecordSampler, Suppressed
from siderolink.common.text import one_line

STDOUT, STDERR = 1, 2
STOP_SECONDS = 1.0
"""How long an ending command waits for its last records to be written."""
MESSAGE_LIMIT, FIELD_LIMIT, TRACEBACK_LIMIT = 1000, 400, 16_000
"""Maximum characters of each part of a record."""
SAMPLE_BURST, LIBRARY_BURST = 1000, 100
"""Records per event name, and per logging call of the library, in one sampling interval."""

_TRACEBACK = "traceback_text"

_logger = logging.getLogger("siderolink.cli")


def log_event(
    name: str,
    text: str,
    *,
    level: int = logging.INFO,
    sample: tuple[str, int] | None = None,
    fields: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Log an event: its name, a one-line description, and fields for programs.

    Events of one name are sampled together: at most SAMPLE_BURST of them in ten seconds. `sample` gives a narrower kind with
    its own burst, such as the refusals for one reason.
    """
    _logger.log(level, "%s", text, extra={"event": name, "sample": sample or (name, SAMPLE_BURST), "fields": fields})


class LogHandler(logging.Handler):
    """Queues each record of this process for the writer. Called on any thread; never blocks."""

    def __init__(self, writer: "LineWriter[logging.LogRecord]", sampler: RecordSampler) -> None:
        super().__init__()
        self._writer = writer
        self._sampler = sampler

    def emit(self, record: logging.LogRecord) -> None:
        kind, burst = getattr(record, "sample", None) or (f"{record.name}: {record.msg}", LIBRARY_BURST)
        if record.levelno > logging.DEBUG and not self._sampler.admit(kind, burst, getattr(record, "event", record.name)):
            return
        try:
            record.msg, record.args = _clean(record.getMessage(), MESSAGE_LIMIT), None
        except Exception as error:  # a faulty log call must not break its caller
            record.msg, record.args = f"a record could not be formatted: {type(error).__name__}", None
        if record.exc_info:
            # formatted now: the traceback's objects may be large, or may change
            failure = _masked("".join(traceback.format_exception(*record.exc_info)))[-TRACEBACK_LIMIT:]
            record.exc_info = record.exc_text = None
            setattr(record, _TRACEBACK, failure)
        self._writer.put(record, 512 + len(record.msg) + len(getattr(record, _TRACEBACK, "")))


class Log:
    """This process's log, from `start_log` to `stop_log`."""

    def __init__(self, level: int, *, as_json: bool, descriptor: int, journal: Journal | None = None) -> None:
        """With a `journal`, records go there instead of to the descriptor."""
        self._sampler = RecordSampler()
        self._journal = journal
        self.writer: LineWriter[logging.LogRecord] = LineWriter(
            descriptor,
            _renderer(as_json) if journal is None else _journal_renderer(),
            notice=_notice,
            tick=lambda: [_suppressed(found) for found in self._sampler.expired(time.monotonic())],
            send=None if journal is None else journal.send,
        )
        self._handler = LogHandler(self.writer, self._sampler)
        self._before = logging.root.handlers[:]
        self._hooks_before = sys.unraisablehook, threading.excepthook
        loggers = logging.root, logging.getLogger("siderolink"), _logger
        self._levels_before = [(logger, logger.level) for logger in loggers]
        logging.root.handlers[:] = [self._handler]
        logging.root.setLevel(max(level, logging.WARNING))
        # the command itself logs the events; further details of the library need --log-level debug
        logging.getLogger("siderolink").setLevel(level if level == logging.DEBUG else max(level, logging.WARNING))
        _logger.setLevel(level)
        logging.captureWarnings(True)
        sys.unraisablehook = _log_unraisable
        threading.excepthook = _log_thread_failure

    def stop(self) -> None:
        """Write queued records, as far as the reader accepts them within STOP_SECONDS; restore handlers, levels and hooks."""
        for logger, level in self._levels_before:
            logger.setLevel(level)
        sys.unraisablehook, threading.excepthook = self._hooks_before
        logging.captureWarnings(False)
        logging.root.handlers[:] = self._before
        self.writer.stop(STOP_SECONDS, last=[_suppressed(found) for found in self._sampler.expired(float("inf"))])
        if self._journal is not None:
            self._journal.close()


_log: Log | None = None
_secrets: set[str] = set()
_own_fields: dict[str, object] = {}


def start_log(level: str, *, as_json: bool, descriptor: int = STDOUT) -> None:
    """Send every log record of this process from `level` (``debug`` to ``error``) up to the descriptor.

    If that is systemd's journal, it also gets the fields, unless JSON is selected.

    The writer's thread starts with the first record, so a process may fork after this call.
    """
    global _log
    if _log is None:
        journal = Journal() if not as_json and SOCKET.exists() and is_journal(descriptor, os.environ) else None
        _log = Log(logging.getLevelNamesMapping()[level.upper()], as_json=as_json, descriptor=descriptor, journal=journal)
        atexit.register(stop_log)


def stop_log() -> None:
    """Flush the queue. Returns within STOP_SECONDS even if the output is not read."""
    global _log
    log, _log = _log, None
    if log is not None:
        log.stop()


def lost_records() -> dict[str, int]:
    """Records dropped because standard output did not accept them; empty if there are none."""
    lost = 0 if _log is None else _log.writer.lost
    return {"log_record_lost": lost} if lost else {}


def name_machine(node_uuid: str) -> None:
    """Add this process's machine to every record from now on."""
    _own_fields["node_uuid"] = node_uuid


def hide(secret: str | None) -> None:
    """Mask a secret in every record from now on. Very short secrets are ignored, because they would mask ordinary words."""
    if secret and len(secret) >= 6:
        _secrets.add(secret)


# --- rendering, on the writer's thread

_JOIN_TOKEN = re.compile(r"(jointoken=)[^&\s]+")
_HIDDEN_FIELDS = ("token", "secret", "password", "private_key")


Render = Callable[[object, str, MutableMapping[str, Any]], Any]


def _renderer(as_json: bool) -> Callable[[logging.LogRecord], bytes]:
    formatter = _formatter(structlog.processors.JSONRenderer(ensure_ascii=False) if as_json else _render_text)
    return lambda record: formatter.format(record).encode(errors="replace") + b"\n"


def _journal_renderer() -> Callable[[logging.LogRecord], bytes]:
    formatter = _formatter(_render_fields)
    return lambda record: formatter.format(record).encode(errors="surrogateescape")


def _formatter(render: Render) -> structlog.stdlib.ProcessorFormatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[_describe, structlog.stdlib.add_log_level],
        processors=[_arrange, _mask, structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
    )


def _describe(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add the record's attributes other than its text."""
    record: logging.LogRecord = event["_record"]
    if hasattr(record, "fields"):
        event["fields"] = record.fields
    else:
        event["fields"] = structlog.stdlib.ExtraAdder()(_logger, "", {"_record": record})
    return event


def _arrange(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Sort the record's keys into output order."""
    record: logging.LogRecord = event["_record"]
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    arranged: dict[str, Any] = {
        "time": f"{moment}.{int(record.msecs):03}Z",
        "level": event["level"],
        "logger": record.name,
        "event": getattr(record, "event", "log"),
        "message": event["event"],
    }
    fields: Mapping[str, Any] = _own_fields | event["fields"]
    for name, value in fields.items():
        if value is not None and name not in arranged and name != _TRACEBACK and not name.startswith("_"):
            arranged[name] = value
    if failure := getattr(record, _TRACEBACK, ""):
        arranged["traceback"] = failure
    return arranged | {"_record": record, "_from_structlog": False}


def _mask(_: object, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Make every value printable and mask secrets."""
    for name, value in event.items():
        if name.startswith("_") or isinstance(value, bool | int | float):
            continue
        if any(word in name for word in _HIDDEN_FIELDS):
            event[name] = "…"
        elif name == "traceback":
            lines = str(value).splitlines()
            event[name] = "\n".join(_clean(line, MESSAGE_LIMIT) for line in lines)
        else:
            event[name] = _clean(str(value), MESSAGE_LIMIT if name == "message" else FIELD_LIMIT)
    return event


def _clean(text: str, limit: int) -> str:
    return one_line(_masked(text), limit=limit)


def _masked(text: str) -> str:
    """Before anything is cut off: the rest of a secret would not be recognised."""
    text = _JOIN_TOKEN.sub(r"\1…", text)
    for secret in tuple(_secrets):
        text = text.replace(secret, "…")
    return text


def _render_text(_: object, __: str, event: MutableMapping[str, Any]) -> str:
    """One line: the time, the event and its text, then the level and the fields that the text does not contain."""
    moment, level, logger, name, message = (event.pop(key) for key in ("time", "level", "logger", "event", "message"))
    failure = event.pop("traceback", "")
    fields = [f"{key}={_quoted(value)}" for key, value in event.items() if str(value) not in message]
    if name == "log":
        name, fields = level, [*fields, f"logger={logger}"]
    line = " ".join([f"{moment} {name}: {message}".rstrip(), f"level={level}", *fields])
    return line + "".join(f"\n    {part}" for part in failure.splitlines())


def _render_fields(_: object, __: str, event: MutableMapping[str, Any]) -> str:
    """A journal record; as text, because the formatter cannot return bytes."""
    level, logger, name, message = (event.pop(key) for key in ("level", "logger", "event", "message"))
    failure = event.pop("traceback", "")
    del event["time"]  # the journal adds its own
    text = message if name == "log" else f"{name}: {message}".rstrip()
    fields = {"event": name, "logger": logger, **event}
    return encode("\n".join(filter(None, (text, failure))), level, fields).decode(errors="surrogateescape")


def _quoted(value: object) -> str:
    text = str(value)
    return f'"{text}"' if not text or any(character in text for character in ' "=') else text


# --- records about the log itself


def _notice(text: str) -> logging.LogRecord:
    return _logger.makeRecord(_logger.name, logging.WARNING, "", 0, text, (), None, extra={"event": "log", "fields": {}})


def _suppressed(found: Suppressed) -> logging.LogRecord:
    text = f"{found.count} more like this in {found.seconds:.0f} s are not shown"
    fields = {"suppressed": found.count, "kind": found.kind}
    extra = {"event": found.name, "fields": fields}
    return _logger.makeRecord(_logger.name, logging.WARNING, "", 0, text, (), None, extra=extra)


def _log_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    error = unraisable.exc_value
    _logger.error("an exception could not be raised: %s", unraisable.err_msg or "", exc_info=error)


def _log_thread_failure(failure: "threading.ExceptHookArgs") -> None:
    _logger.error("a thread failed", exc_info=failure.exc_value)
