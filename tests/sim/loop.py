"""An asyncio event loop whose clock is a number: waiting costs nothing, and every run is the same.

Where a real selector would sleep, this one adds the time-out to the clock. If no
task could ever run again, that is a deadlock, and it says so.

What runs in a `Host`'s context belongs to that simulated process: the process can be
paused, as SIGSTOP does it, and has a clock of its own, which may run fast or slow.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import logging
import math
import selectors
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

CURRENT: contextvars.ContextVar[Host | None] = contextvars.ContextVar("host", default=None)


class Deadlock(AssertionError):
    """Every task waits for another."""


class Host:
    """One run of a simulated process. `rate`: how fast its monotonic clock runs."""

    def __init__(self, name: str, rate: float = 1.0) -> None:
        self.name, self.rate = name, rate
        self.alive = True  # a dead process sends nothing, whatever it still does
        self.paused = False
        self._waiting: list[asyncio.Handle] = []  # what came due while it was paused
        self.context = contextvars.copy_context()
        self.context.run(CURRENT.set, self)

    def local(self, now: float) -> float:
        return now * self.rate

    def world(self, local: float) -> float:
        """When the clock of the world shows it; never so early that ours does not, by rounding."""
        now = local / self.rate
        while self.local(now) < local:
            now = math.nextafter(now, math.inf)
        return now

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        """Everything that came due meanwhile happens now, in its order."""
        self.paused = False
        waiting, self._waiting = self._waiting, []
        asyncio.get_running_loop()._ready.extend(waiting)  # type: ignore[attr-defined]


@contextmanager
def silence() -> Iterator[None]:
    """Nothing is logged meanwhile: formatting lines costs more than many a story."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class _Held:
    """The part of a handle that knows its process."""

    _context: contextvars.Context

    def _run(self) -> None:
        host = self._context.get(CURRENT)
        if host is not None and host.paused:
            host._waiting.append(self)  # type: ignore[arg-type]
        else:
            super()._run()  # type: ignore[misc]


class _Handle(_Held, asyncio.Handle): ...


class _TimerHandle(_Held, asyncio.TimerHandle): ...


class _Clock(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Deadlock("every task waits, and nothing will wake one")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Clock()
        super().__init__(self._virtual)

    def time(self) -> float:
        """The clock of the process that asks."""
        host = CURRENT.get()
        now = self._virtual.now
        return now if host is None else host.local(now)

    def world_time(self) -> float:
        """The clock of the world, which no process can see."""
        return self._virtual.now

    def call_at(  # type: ignore[override]  # its own is typed by the call-back's arguments
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        host = CURRENT.get()  # whose clock `when` was read off
        timer = _TimerHandle(when if host is None else host.world(when), callback, args, self, context)
        heapq.heappush(self._scheduled, timer)  # type: ignore[attr-defined]
        timer._scheduled = True  # type: ignore[attr-defined]
        return timer

    def _call_soon(
        self, callback: Callable[..., object], args: Any, context: contextvars.Context | None
    ) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)  # type: ignore[attr-defined]
        return handle

    def run_in_executor(self, *arguments: Any) -> Any:  # type: ignore[override]
        raise AssertionError("a thread would make the simulation unrepeatable")


def world_time() -> float:
    """Seconds by a clock that is the same for all: the simulated world's, or on a real loop the real one."""
    loop = asyncio.get_running_loop()
    return loop.world_time() if isinstance(loop, VirtualLoop) else loop.time()


def run(main: Coroutine[Any, Any, T], limit: float = 10_000.0) -> T:
    """Run `main` in virtual time; more than `limit` virtual seconds is a failure."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(asyncio.wait_for(main, limit))
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()
