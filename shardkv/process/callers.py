"""How one process knows its callers: its certificate checked, its authorizer, and what keeps the authorizer informed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from random import Random

from shardkv.process.options import ProcessOptions
from shardkv.raft.disk import RealDirectory
from shardkv.raft.replica import Replica
from shardkv.raft.unreadable import Unreadable
from shardkv.server.access import Access
from shardkv.server.accounts_copy import AccountsFollower
from shardkv.shardctrler.accounts import Accounts
from shardkv.shardctrler.client import ControllerClient
from shardkv.shardctrler.machine import ControllerMachine
from shardkv.wire.audit import Audit
from shardkv.wire.dialer import TcpDialer
from shardkv.wire.handshake import Greeter
from shardkv.wire.node_name import NodeName, is_for, names_in
from shardkv.wire.sealed_answers import unseal
from shardkv.wire.secrets import Secrets
from shardkv.wire.tls import BadCertificate
from shardkv.wire.tls_files import TlsFiles

log = logging.getLogger(__name__)

ACCOUNTS = "accounts"  # the users: the file in which a group keeps them, and the use for which they are sealed


def check_certificate(options: ProcessOptions) -> None:
    """Our certificate has to be for this process, else nobody would believe us. Raises BadCertificate."""
    if options.tls is None:
        return
    shown = options.tls.shown()
    if not is_for(shown, options.member):
        raise BadCertificate(
            f"certificate {options.tls.cert} is not for {options.member}: it needs the URI "
            f"{NodeName(options.cluster, options.gid, options.replica).uri} (`shardkv certs` puts it there)"
        )
    if any(name.covers(options.member) and name.group is None for name in names_in(shown)):
        log.warning(
            "certificate %s is valid for every process of the cluster: whoever steals its key can pose as any of them",
            options.tls.cert,
        )


def greeter_of(
    options: ProcessOptions, secrets: Secrets, authorizer: Access, certificates: TlsFiles | None
) -> Greeter:
    addresses = {options.address, options.listen} - {""}

    def hashes() -> tuple[bytes, ...]:
        return certificates.certificate_hashes if certificates is not None else ()

    return Greeter(options.member, secrets, addresses, authorizer.user_verifier, hashes)


def authorizer_of(
    options: ProcessOptions,
    directory: RealDirectory,
    replica: Replica,
    dialer: TcpDialer,
    secrets: Secrets,
    rng: Random,
    audit: Audit,
    on_change: Callable[[], None],
) -> tuple[Access, list[asyncio.Task[None]]]:
    """The authorizer, and the tasks that keep it informed. `on_change`: the users have changed."""
    machine = replica.machine
    with_tls = options.tls is not None
    secured = with_tls or bool(secrets)
    if isinstance(machine, ControllerMachine):
        # While the state is lost, the users are not known here: see AccountsFollower.
        unknown = None if secured else Accounts()
        heard = machine.accounts

        def accounts() -> Accounts | None:
            return unknown if replica.state_lost else machine.accounts

        def turned() -> None:
            nonlocal heard
            if machine.accounts is not heard:
                heard = machine.accounts
                on_change()

        replica.on_turn.append(turned)
        return Access(accounts, options.member, secrets, with_tls, options.limits, audit), []
    try:
        known = directory.read(ACCOUNTS) if ACCOUNTS in directory.names() else None
    except Unreadable as error:
        log.error("%s is damaged: %s; asking the controllers for the users", ACCOUNTS, error)
        known = b""  # damaged: the controllers tell us again
    follower = AccountsFollower(known, partial(directory.replace, ACCOUNTS), secured)
    follower.on_change = on_change
    client = ControllerClient(options.controllers, dialer, rng)
    if not with_tls:
        client.unseal = partial(unseal, secrets, ACCOUNTS)
    following = asyncio.get_running_loop().create_task(follower.follow(client))
    following.add_done_callback(partial(_followed, replica))
    authorizer = Access(lambda: follower.accounts, options.member, secrets, with_tls, options.limits, audit)
    return authorizer, [following]


def _followed(replica: Replica, task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        replica.node.fail(task.exception())  # the disk did not take the table
