"""A network of numbers: it may lose, delay, reorder, repeat and cut, all drawn from one seed.

Addresses are plain strings. A process listens under its address while it is up;
what arrives for one that is down is lost (a call to it fails after the delay, as
a refused connection does), and what arrives for one that is paused waits for it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from shardkv.raft.codec import MalformedMail, decode_mail, encode_mail
from shardkv.raft.protocol.messages import Envelope
from shardkv.wire.calls import Handler, Unreachable
from tests.sim.loop import Host

Note = Callable[[str, str, str, bytes], None]


@dataclass
class Weather:
    """How bad the network is. Seconds and probabilities."""

    delay: tuple[float, float] = (0.0005, 0.002)
    loss: float = 0.0
    repeat: float = 0.0
    long_delay: float = 0.0  # chance that a message takes up to 20 times as long: reordering
    flip: float = 0.0  # chance that a bit of a replica's mail flips on its way, unseen by TCP's checksum


@dataclass
class _Process:
    host: Host
    handler: Handler | None
    on_post: Callable[[str, bytes], None] | None
    on_break: Callable[[str], None]


class SimNetwork:
    def __init__(self, rng: Random, weather: Weather | None = None) -> None:
        self._rng = rng
        self.context = contextvars.copy_context()  # no process's: what is under way arrives, whoever is paused
        self.weather = weather or Weather()
        self.cut: set[tuple[str, str]] = set()  # (from, to) that do not get through
        self.slow: dict[tuple[str, str], float] = {}  # (from, to) -> seconds that each message takes longer
        self.sent: Counter[str] = Counter()  # messages and bytes, by kind
        self.on_mail: Callable[[str, str, Sequence[Envelope]], None] = lambda source, target, mail: None
        self.note: Note = lambda what, source, target, payload: None  # everything that arrives
        self._processes: dict[str, _Process] = {}
        self._serving: dict[asyncio.Task[None], None] = {}

    def listen(
        self,
        host: Host,
        handler: Handler | None = None,
        on_post: Callable[[str, bytes], None] | None = None,
        on_break: Callable[[str], None] = lambda address: None,
    ) -> None:
        self._processes[host.name] = _Process(host, handler, on_post, on_break)

    def hang_up(self, address: str) -> None:
        """The process there is gone: its kernel tells the others, if they can hear it."""
        if self._processes.pop(address, None) is None:
            return
        for name, process in self._processes.items():

            def arrive(process: _Process = process) -> None:
                loop = asyncio.get_running_loop()
                loop.call_soon(process.on_break, address, context=process.host.context)

            self.transmit(address, name, arrive, once=True)

    # ---- partitions

    def isolate(self, address: str, others: Iterable[str]) -> None:
        for other in others:
            if other != address:
                self.cut |= {(address, other), (other, address)}

    def partition(self, *sides: Sequence[str]) -> None:
        """Only addresses on the same side hear each other; those named nowhere are untouched."""
        for side in sides:
            for other in sides:
                if side is not other:
                    self.cut |= {(a, b) for a in side for b in other}

    def heal(self) -> None:
        self.cut.clear()
        self.slow.clear()

    # ---- traffic

    def transmit(self, source: str, target: str, arrive: Callable[[], None], once: bool = False) -> None:
        """Carry one message, if the weather lets it; perhaps twice, unless at most `once`."""
        rng, weather = self._rng, self.weather
        copies = 1 + (not once and rng.random() < weather.repeat)
        for _ in range(copies):
            lost = rng.random() < weather.loss
            delay = rng.uniform(*weather.delay) + self.slow.get((source, target), 0.0)
            if rng.random() < weather.long_delay:
                delay *= rng.uniform(1, 20)
            if not lost and (source, target) not in self.cut:
                asyncio.get_running_loop().call_later(
                    delay, self._arrive, source, target, arrive, context=self.context
                )

    def _arrive(self, source: str, target: str, arrive: Callable[[], None]) -> None:
        if (source, target) not in self.cut:  # a cut takes what is under way as well
            arrive()

    def post(self, source: str, target: str, method: str, payload: bytes) -> None:
        if self.weather.flip and self._rng.random() < self.weather.flip:
            bit = self._rng.randrange(8 * len(payload))
            flipped = bytearray(payload)
            flipped[bit // 8] ^= 1 << bit % 8
            payload = bytes(flipped)
            self.sent["flipped"] += 1

        def arrive() -> None:
            process = self._processes.get(target)
            if process is not None and process.on_post is not None:
                self.note(method, source, target, payload)
                loop = asyncio.get_running_loop()
                loop.call_soon(process.on_post, method, payload, context=process.host.context)

        self.transmit(source, target, arrive)

    async def call(self, source: str, target: str, method: str, payload: bytes, timeout: float) -> bytes:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()

        def refuse() -> None:
            if not answer.done():
                answer.set_exception(Unreachable(f"{target}: connection refused"))

        def reply(payload: bytes) -> None:
            if not answer.done():
                self.note(f"answer to {method}", target, source, payload)
                answer.set_result(payload)

        async def serve(process: _Process) -> None:
            assert process.handler is not None
            result = await process.handler(method, payload)
            if process.host.alive:
                self.transmit(target, source, lambda: reply(result))

        def arrive() -> None:
            process = self._processes.get(target)
            if process is None or process.handler is None:
                self.transmit(target, source, refuse)
            else:
                self.note(method, source, target, payload)
                task = loop.create_task(serve(process), context=process.host.context)
                self._serving[task] = None
                task.add_done_callback(self._serving.pop)

        self.transmit(source, target, arrive, once=True)  # as the interface says
        try:
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError:
            raise Unreachable(f"{target}: no answer within {timeout:.3g} s") from None


class SimDialer:
    """The `Dialer` of one simulated process."""

    def __init__(self, network: SimNetwork, address: str, host: Host | None = None) -> None:
        self._network, self._address, self._host = network, address, host

    async def call(self, address: str, method: str, payload: bytes, timeout: float) -> bytes:
        if self._host is not None and not self._host.alive:
            raise Unreachable("the caller is dead")
        return await self._network.call(self._address, address, method, payload, timeout)

    async def close(self) -> None: ...


class SimTransport:
    """The `Transport` of one simulated replica. Real encoding, simulated wire."""

    def __init__(
        self,
        network: SimNetwork,
        cluster: str,
        group: int,
        host: Host,
        peers: Mapping[int, str],
        incarnation: int = 0,
    ) -> None:
        self._network, self._cluster, self._group = network, cluster, group
        self._host, self._peers = host, dict(peers)
        self._incarnation, self._incarnations = incarnation, dict[int, int]()
        self.on_unreachable: Callable[[int], None] = lambda node: None

    def broke(self, address: str) -> None:
        """The connection to `address` broke."""
        for node, known in self._peers.items():
            if known == address and self._host.alive:
                self.on_unreachable(node)

    def set_peers(self, addresses: Mapping[int, str], incarnations: Mapping[int, int]) -> None:
        self._peers, self._incarnations = dict(addresses), dict(incarnations)

    def send(self, envelopes: Sequence[Envelope]) -> None:
        if not self._host.alive:
            return
        source = self._host.name
        for envelope in envelopes:
            target = self._peers.get(envelope.to, "")
            if target in ("", source):
                continue  # removed, or never heard from; or one that had our own address before us
            to_incarnation = self._incarnations.get(envelope.to, 0)
            mail = encode_mail(
                self._cluster, self._group, source, [envelope], self._incarnation, to_incarnation
            )
            self._network.sent["messages"] += 1
            self._network.sent["bytes"] += len(mail)
            self._network.on_mail(source, target, [envelope])
            self._network.post(source, target, "raft", mail)

    def unpack(self, payload: bytes) -> list[Envelope]:
        try:
            address, envelopes = decode_mail(self._cluster, self._group, payload)
        except MalformedMail:
            assert self._network.sent["flipped"], "nobody sends malformed mail"
            return []
        for envelope in envelopes:
            self._peers.setdefault(envelope.sender, address)
        return envelopes
