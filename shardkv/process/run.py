"""One server process: opens the disk, starts the replica, listens, and ends in order.

This is where the real interfaces are put in: files, sockets, the wall clock, the system's
randomness. Everything behind them is the code that the simulator runs.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Coroutine
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from random import Random
from typing import Any

import grpc
import grpc.aio
import uvloop

from shardkv import shardkv_pb2 as kv_pb
from shardkv import shardkv_pb2_grpc as kv_grpc
from shardkv.observe.health import CONTROLLER, KV, Health
from shardkv.observe.logs import configure
from shardkv.observe.metrics import Metrics
from shardkv.process.callers import ACCOUNTS, authorizer_of, check_certificate, greeter_of
from shardkv.process.identity import CannotStart, Identity, claim, learn_cluster
from shardkv.process.listeners import Listeners
from shardkv.process.options import CONTROLLER_GROUP, STDERR, ProcessOptions
from shardkv.process.secret_file import BadSecretFile, read_secrets
from shardkv.process.secret_file import watch as watch_secrets
from shardkv.process.stores import named_below, store_of
from shardkv.process.wiring import Interfaces, Server, Settings, open_server
from shardkv.raft import space_watch
from shardkv.raft.disk import RealDirectory, free_bytes
from shardkv.raft.errors import DamagedState, StorageError
from shardkv.raft.private import keep_private, tighten, warn_if_open
from shardkv.raft.protocol.space import FULL_PART
from shardkv.raft.reconfigure import hand_over
from shardkv.raft.repair import note_damage
from shardkv.raft.replica import Replica
from shardkv.raft.transport import MAIL, TcpTransport
from shardkv.server.access import AccessInterceptor
from shardkv.server.audit import AUDIT_FILE, AuditLog
from shardkv.server.group import GroupServer
from shardkv.server.grpc_service import KVService
from shardkv.shardctrler import shardctrler_pb2 as ctl_pb
from shardkv.shardctrler import shardctrler_pb2_grpc as ctl_grpc
from shardkv.shardctrler.grpc_service import ControllerService
from shardkv.shardctrler.server import ControllerServer
from shardkv.state.machine import ShardMachine
from shardkv.storage.rocks import RocksEngine
from shardkv.wire import methods
from shardkv.wire.auth import Node
from shardkv.wire.descriptors import Descriptors, TooFewDescriptors
from shardkv.wire.dialer import TcpDialer
from shardkv.wire.listener import Listener, Pipes, private_socket
from shardkv.wire.sealed_answers import seal
from shardkv.wire.secrets import Secrets
from shardkv.wire.server_stream import ServerStream
from shardkv.wire.tls import BadCertificate
from shardkv.wire.tls_files import TlsFiles

log = logging.getLogger(__name__)

# A gRPC connection may have few calls under way, and little of each is read before somebody asks for it.
MAX_GRPC_CALLS = 4096
GRPC_OPTIONS = (
    ("grpc.max_concurrent_streams", 128),
    ("grpc.http2.lookahead_bytes", 64 << 10),
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.max_connection_idle_ms", 600_000),
)
methods.check_streams(methods.At.CONTROLLER, ControllerServer.ANSWERS)
methods.check_streams(methods.At.GROUP, GroupServer.ANSWERS)
for service in (kv_pb.DESCRIPTOR.services_by_name["KV"], ctl_pb.DESCRIPTOR.services_by_name["Controller"]):
    methods.check_unary(service)
UNLIMITED = 1 << 20  # descriptors, where the system sets no limit
HAND_OVER_SECONDS = 0.5  # it takes some 10 ms, unless the others stop as well


class CannotServe(Exception):
    """The process ends, in one line. `kind`: what stopped it, for programs."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class StateDamaged(Exception):
    """This replica met damage in its state and stopped. Once that is noted, the next start has it repaired."""

    def __init__(self, damage: DamagedState, pause_seconds: float | None) -> None:
        """`pause_seconds`: before the next start; None where the disk was too full to note the damage."""
        super().__init__(str(damage))
        self.damage, self.pause_seconds = damage, pause_seconds


def clock_ms() -> int:
    return int(time.time() * 1000)


async def serve(options: ProcessOptions) -> None:
    """Run one replica until SIGTERM or SIGINT.

    Raises CannotStart, StorageError, StateDamaged, or the fault that stopped it.
    """
    rng = Random(random.SystemRandom().getrandbits(128))
    directory = RealDirectory(options.data)
    certificates = TlsFiles(options.tls) if options.tls is not None else None
    reload = certificates.wake if certificates is not None else _nothing_to_reload
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    watching: list[asyncio.Task[None]] = []
    try:
        secrets = Secrets(read_secrets(options.secret_file) if options.secret_file is not None else ())
        if not options.cluster:
            options = replace(options, cluster=await learn_cluster(directory, options, secrets, rng))
        check_certificate(options)
        who = Node(options.member, secrets)
        identity = await claim(directory, Identity.new(options, rng), str(options.data))
        tighten(options.data)  # now that it is known to be ours
        disks = identity.disks(options.addresses or {options.replica: options.address})
        peers = {node: at for node, at in disks.addresses(disks.first).items() if node != options.replica}
        transport = TcpTransport(
            options.cluster,
            options.gid,
            options.address,
            peers,
            certificates,
            who if secrets or options.tls is not None else None,
            identity.incarnation,
        )
        dialer = TcpDialer(options.cluster, certificates, who)
        world = Interfaces(
            directory,
            store_of(directory, options.gid, options.ephemeral, options.descriptors.tables),
            transport,
            dialer,
            rng,
            clock_ms,
            partial(asyncio.to_thread, directory.free_bytes),
        )
        settings = Settings(
            options.controllers,
            options.initial_shards,
            options.reserve_bytes,
            options.limits,
            raft=options.raft,
        )
        server, space = await open_server(identity, disks, world, settings)
        watching.append(space)
        replica = server.replica
        transport.on_refused = replica.node.mail_refused
        transport.on_answers = replica.node.receive
        machine = replica.machine
        if isinstance(machine, ShardMachine):
            # Background work of the engine may find damage on a thread of its own.
            loop = asyncio.get_running_loop()
            if isinstance(machine.engine, RocksEngine) and options.scrub_bytes_per_second:
                machine.engine.start_scrub(options.scrub_bytes_per_second)
            machine.engine.on_fault = lambda fault: _on_loop(loop, replica, fault)
        if certificates is not None:
            watching.append(asyncio.create_task(certificates.watch()))
        metrics = Metrics()
        metrics.watch(replica)
        directory.on_append = metrics.appended
        with private_socket() as (name, path):
            await _listen(
                options,
                directory,
                server,
                transport,
                dialer,
                secrets,
                rng,
                metrics,
                certificates,
                name,
                path,
            )
    except DamagedState as damage:  # of a replica that was running
        error = named_below(directory.path, damage)
        raise StateDamaged(error, await noted(directory, error)) from None
    finally:
        for task in watching:
            task.cancel()
        directory.close()


async def noted(directory: RealDirectory, damage: DamagedState) -> float | None:
    """See `note_damage`; None where the disk is full. Raises OSError for any other failure."""
    try:
        return await note_damage(directory, damage, clock_ms())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return None


def note_when_room(options: ProcessOptions, damage: DamagedState) -> float:
    """Wait for room and note the damage: until then no start may trust the state. Raises OSError."""
    while True:
        _wait_for_room(options)
        directory = RealDirectory(options.data)
        try:
            pause = asyncio.run(noted(directory, damage))
        finally:
            directory.close()
        if pause is not None:
            return pause
        time.sleep(space_watch.WATCH_SECONDS)  # a quota, say, of which free_bytes knows nothing


def _on_loop(loop: asyncio.AbstractEventLoop, replica: Replica, fault: BaseException) -> None:
    loop.call_soon_threadsafe(replica.node.fail, fault)


async def _listen(
    options: ProcessOptions,
    directory: RealDirectory,
    server: Server,
    transport: TcpTransport,
    dialer: TcpDialer,
    secrets: Secrets,
    rng: Random,
    metrics: Metrics,
    certificates: TlsFiles | None,
    socket_name: str,
    socket: str,
) -> None:
    replica = server.replica
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _end, ended)

    def on_fault(error: BaseException) -> None:
        if not ended.done():
            ended.set_exception(error)

    replica.node.on_fault = on_fault

    def on_post(method: str, payload: bytes, stream: ServerStream) -> None:
        if method == MAIL:
            replica.node.receive(transport.unpack(payload, stream))

    def on_change() -> None:
        listener.recheck()

    audit = AuditLog(None if options.audit == STDERR else options.data / AUDIT_FILE)
    authorizer, background = authorizer_of(options, directory, replica, dialer, secrets, rng, audit, on_change)
    if options.secret_file is not None:
        secrets.on_change.append(on_change)
        background.append(asyncio.create_task(watch_secrets(options.secret_file, secrets)))
    greeter = greeter_of(options, secrets, authorizer, certificates)
    pipes = Pipes()
    grpc_server = grpc.aio.server(
        interceptors=[AccessInterceptor(authorizer, pipes)],
        options=GRPC_OPTIONS,
        maximum_concurrent_rpcs=MAX_GRPC_CALLS,
    )
    grpc_server.add_insecure_port(socket_name)
    _add_services(server, grpc_server)
    if isinstance(server, ControllerServer) and options.tls is None:
        server.sealing = partial(seal, secrets, ACCOUNTS)
    health = Health(replica, grpc_server, CONTROLLER if options.gid == CONTROLLER_GROUP else KV)
    handler = metrics.timed(server.handle, methods.METHODS)
    listener = Listener(greeter, handler, on_post, socket, authorizer, options.descriptors, audit, pipes)
    metrics.watch_acceptor(listener.acceptor)
    metrics.watch_quotas(authorizer.quotas.refused)
    listener.acceptor.connections_of = authorizer.quotas.connections
    about = {"knows_processes": authorizer.knows_processes, "version": version("shardkv")}

    def tell() -> dict[str, object]:
        told = about | {"secrets": secrets.ids, "connections": listener.acceptor.status()}
        return told if certificates is None else told | {"certificates": certificates.status()}

    server.about = tell
    if certificates is not None:
        metrics.watch_certificates(certificates)
        certificates.audit = audit
        certificates.on_revocations = lambda: listener.acceptor.end_all("the revocation list changed")
    listeners = Listeners(options, options.descriptors, audit)
    try:
        await grpc_server.start()
        await listeners.open_main(listener, certificates.server if certificates is not None else None)
        await listeners.open_metrics(metrics)
        await listeners.open_page(
            replica, authorizer, dialer, rng, certificates.browsers if certificates is not None else None
        )
        background.append(asyncio.create_task(listeners.warn_if_open(replica, authorizer)))
        await ended
        health.leaving()
        await hand_over(replica, HAND_OVER_SECONDS)
    finally:
        for task in background:
            task.cancel()
        await listeners.close()
        await grpc_server.stop(0.2)
        await server.stop()
        await transport.close()
        await dialer.close()
        await asyncio.to_thread(audit.close)


def _add_services(server: Server, grpc_server: Any) -> None:
    if isinstance(server, ControllerServer):
        ctl_grpc.add_ControllerServicer_to_server(ControllerService(server), grpc_server)
    else:
        kv_grpc.add_KVServicer_to_server(KVService(server), grpc_server)


def _nothing_to_reload() -> None:
    log.info("SIGHUP: there are no TLS files to read again")


def _end(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


def run(options: ProcessOptions) -> None:
    """Serve until told to stop. Raises CannotServe."""
    if not __debug__:
        raise CannotServe("Python", "shardkv does not run under python -O: its assertions guard the data")
    keep_private()
    configure(options.log_format, options.log_level)
    for secret in (options.secret_file, options.tls.key if options.tls is not None else None):
        if secret is not None:
            warn_if_open(secret)
    # As many connections and tables as we may; the soft limit is for programs that use select(2).
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        most = UNLIMITED if most == resource.RLIM_INFINITY else most
        options = replace(options, descriptors=Descriptors.divide(most))
        _run(serve(options))
    except (CannotStart, TooFewDescriptors, StorageError, BadCertificate, BadSecretFile) as error:
        raise CannotServe(type(error).__name__, str(error)) from None
    except StateDamaged as error:
        print(
            f"shardkv: {error}; starting again, to be repaired from the other replicas",
            file=sys.stderr,
            flush=True,
        )
        pause = error.pause_seconds
        if pause is None:
            try:
                pause = note_when_room(options, error.damage)
            except OSError as failed:
                raise CannotServe("Disk", f"the disk failed, and the damage is not noted: {failed}") from None
        if pause:
            print(
                f"shardkv: damage was found again and again: the disk itself is suspect. Waiting {pause:g} s",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(pause)  # SIGTERM ends us
        os.execv(sys.executable, sys.orig_argv)  # a fresh start: what was read beside the damage may be wrong
    except OSError as error:
        text = f"the disk failed, and this replica stopped: {error}"
        if error.errno != errno.ENOSPC:
            raise CannotServe("Disk", text) from None
        print(f"shardkv: {text}", file=sys.stderr)
        _wait_for_room(options)
        os.execv(sys.executable, sys.orig_argv)  # a fresh start, for what is in memory may be ahead of the disk


def _wait_for_room(options: ProcessOptions) -> None:
    """The disk was filled up in one go, past the reserve: come back once there is some room. SIGTERM ends us."""
    print("shardkv: waiting for room on the disk", file=sys.stderr, flush=True)
    enough = options.reserve_bytes // FULL_PART
    while free_bytes(options.data) <= enough:
        time.sleep(space_watch.WATCH_SECONDS)


def _run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)
