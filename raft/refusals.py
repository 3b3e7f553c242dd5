"""The messages that a replica refused: counted by sender, and named in the log at a bounded rate."""

from __future__ import annotations

import logging
from collections import Counter

from shardkv.raft.protocol.types import NOBODY, NodeId

log = logging.getLogger(__name__)

LOG_SECONDS = 1.0  # at most one line in that time; the metric counts all messages
MAX_NAMED = 64  # senders that are counted by their number; what further ones send counts for 0


class Refusals:
    """How much mail was refused, by sender, and the lines in the log about it."""

    def __init__(self) -> None:
        self.by_sender: Counter[NodeId] = Counter()
        self._silent_until = 0.0
        self._unsaid = 0

    def note(self, sender: NodeId, why: str, now: float) -> None:
        """A message of `sender` was refused. A flood of them costs a line a second."""
        named = sender in self.by_sender or len(self.by_sender) < MAX_NAMED
        self.by_sender[sender if named else NOBODY] += 1
        if now < self._silent_until:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} messages more since the last such line)" if self._unsaid else ""
        log.error("refused a message: %s%s", why, more)
        self._silent_until, self._unsaid = now + LOG_SECONDS, 0
