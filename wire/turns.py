"""One at a time, and owners take turns: a lock for long work, that somebody with much of it cannot keep for himself."""

from __future__ import annotations

import asyncio
from collections import deque
from contextvars import ContextVar

OWNER: ContextVar[str] = ContextVar("OWNER", default="")
"""For whom a server is at work: a user or, where nobody is asked who he is, a source address."""


class Turns:
    """Like `asyncio.Lock`, but a waiter of another owner goes first. Of one owner the oldest goes first."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # the owner whose turn is next comes first

    async def acquire(self, owner: str) -> None:
        if not self._taken:
            self._taken = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.release()  # it was given to us in the moment that we left
            else:
                self._forget(owner, turn)
            raise

    def _forget(self, owner: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(owner, deque())
        if turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[owner]

    def release(self) -> None:
        while self._waiting:
            owner = next(iter(self._waiting))
            turns = self._waiting.pop(owner)
            turn = turns.popleft()
            if turns:
                self._waiting[owner] = turns  # behind the others
            if not turn.done():  # else: who waited has left
                turn.set_result(None)
                return
        self._taken = False
