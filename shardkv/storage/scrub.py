"""Reads every file of a replica's database again and again, slowly, and compares it with its hash.

Damage in what nobody reads would else stay unseen until the last whole replica fails. The scrub
works on a thread of its own, in pieces of 256 KiB, at a bounded rate, and rests between rounds. What
the scrub finds the engine reports to its owner like any other damage; the scrub then stops.

Files that RocksDB has made since get their hashes from here as well, within a second, at any rate
but 0: rate 0 turns the scrub off, and hashes are then noted at flushes alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from shardkv.raft.errors import DamagedState
from shardkv.storage.tables import Interrupted

log = logging.getLogger(__name__)

REST_SECONDS = 60.0  # between rounds
LOOK_SECONDS = 1.0  # for new files, while it rests
LONGEST_WAIT_SECONDS = 1.0  # for a piece, at the lowest rates


class Scrubbed(Protocol):
    """What the scrub needs of an engine."""

    def files(self) -> dict[str, int]: ...

    def note_files(self) -> None: ...

    def check_file(self, name: str, pace: Callable[[int], None]) -> None: ...


class Scrub:
    """One engine's scrub; it runs from the start, until it is stopped or finds damage."""

    def __init__(self, engine: Scrubbed, bytes_per_second: int, rest_seconds: float = REST_SECONDS) -> None:
        assert bytes_per_second > 0
        self._engine, self._rate, self._rest_seconds = engine, bytes_per_second, rest_seconds
        self._checked = self._total = self._rounds = 0
        self._last_round = 0.0
        self._damaged: list[str] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrub", daemon=True)
        self._thread.start()

    @property
    def progress(self) -> dict[str, Any]:
        """For people and their tools. Times are seconds since 1970."""
        return {
            "bytes_checked": self._checked,  # of this round
            "bytes_total": self._total,
            "bytes_per_second": self._rate,
            "rounds": self._rounds,
            "last_round_at": self._last_round,
            "damaged": list(self._damaged),
        }

    def stop(self) -> None:
        """Return once the thread has ended."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                self._round()
                self._rest()
        except Interrupted:
            pass
        except DamagedState as error:  # the engine has told its owner, which stops the replica
            self._damaged.append(Path(error.file).name)
        except OSError as error:
            log.error("the scrub stops: %s", error)

    def _round(self) -> None:
        self._engine.note_files()
        files = self._engine.files()
        self._checked, self._total = 0, sum(files.values())
        for name in sorted(files):
            self._engine.check_file(name, self._pace)
        self._rounds += 1
        self._last_round = time.time()

    def _rest(self) -> None:
        until = time.monotonic() + self._rest_seconds
        while time.monotonic() < until:
            self._wait(min(LOOK_SECONDS, self._rest_seconds))
            self._engine.note_files()

    def _pace(self, count: int) -> None:
        """Before each piece: wait as long as the rate asks for."""
        self._wait(min(LONGEST_WAIT_SECONDS, count / self._rate))
        self._checked += count

    def _wait(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise Interrupted
