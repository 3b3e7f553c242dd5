"""Log lines for people, or one JSON object a line for machines.

A thread writes them: the log may lie on the disk that hangs, and the event loop must not wait for it.
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
TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class JsonFormatter(logging.Formatter):
    """time (ISO 8601, UTC), level, logger, message; `error` with the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _Queued(QueueHandler):
    """Hands records to the thread. While its disk hangs and the queue is full, further ones are lost and counted."""

    lost = 0

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
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
    lines: queue.Queue[logging.LogRecord] = queue.Queue(MAX_WAITING_LINES)
    listener = QueueListener(lines, handler)
    logging.basicConfig(level=level, handlers=[_Queued(lines)], force=True)
    listener.start()
    atexit.register(listener.stop)  # writes what waits
