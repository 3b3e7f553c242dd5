"""Log lines for people, or one JSON object a line for machines.

A thread writes them: the log may lie on the disk that hangs, and the event loop must not wait for it.
Texts that a stranger chose may be in them, so what cannot be printed is escaped, a line has a bound, and of each
place in the code so many lines a second are written; the next one says how many were left out.
"""

from __future__ import annotations

import atexit
import json
import logging
import queue
import sys
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener

MAX_WAITING_LINES = 10_000
MAX_MESSAGE = 8192  # characters
A_SECOND, BURST = 10, 100  # lines of one place in the code
MAX_PLACES = 10_000
TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def printable(text: str) -> str:
    """One line, of what can be printed, and not too long."""
    cut = text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…"
    if cut.isprintable():
        return cut
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut)


class TextFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """time (ISO 8601, UTC), level, logger, message; `error` with the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": printable(record.getMessage()),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _Queued(QueueHandler):
    """Hands records to the thread. While its disk hangs and the queue is full, further ones are lost and counted."""

    lost = 0

    def __init__(self, lines: queue.Queue[logging.LogRecord]) -> None:
        super().__init__(lines)
        # Of each place: how many lines it may write now, when that was counted, how many it did not.
        self._places: dict[tuple[str, int], tuple[float, float, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        place = record.pathname, record.lineno
        if len(self._places) > MAX_PLACES:
            self._places.clear()
        tokens, counted_at, left_out = self._places.get(place, (float(BURST), record.created, 0))
        tokens = min(BURST, tokens + max(0.0, record.created - counted_at) * A_SECOND)
        if tokens < 1:
            self._places[place] = tokens, record.created, left_out + 1
            return
        self._places[place] = tokens - 1, record.created, 0
        if left_out:
            record.msg = f"{record.getMessage()} ({left_out} lines of this kind before this one were left out)"
            record.args = None
        super().emit(record)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.msg, record.args = record.getMessage(), None  # arguments may change before the thread looks
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.lost:
            record.msg = f"{record.msg} ({self.lost} lines before this one were lost: the log's disk hung)"
        try:
            self.queue.put_nowait(record)
            self.lost = 0
        except queue.Full:
            self.lost += 1


def configure(form: str, level: str) -> None:
    """Log to stderr. `form` is text or json, `level` one of logging's names."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(TEXT))
    lines: queue.Queue[logging.LogRecord] = queue.Queue(MAX_WAITING_LINES)
    listener = QueueListener(lines, handler)
    logging.basicConfig(level=level, handlers=[_Queued(lines)], force=True)
    listener.start()
    atexit.register(listener.stop)  # writes what waits
