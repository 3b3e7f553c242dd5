"""Users' verifiers do not travel in clear: without TLS the controllers' answers to groups are sealed with the secret."""

from __future__ import annotations

import asyncio

import pytest

from bench.live import LiveCluster, attempt
from shardkv.client import Login, ShardClerk
from shardkv.process.secret_file import read_secrets
from shardkv.shardctrler import shardctrler_pb2 as pb
from shardkv.shardctrler.accounts import Accounts
from shardkv.wire.auth import Node
from shardkv.wire.calls import Code, parse
from shardkv.wire.dialer import TcpDialer
from shardkv.wire.node_name import Member
from shardkv.wire.proof import Verifier
from shardkv.wire.sealed_answers import seal, unseal
from shardkv.wire.secrets import Secrets


@pytest.mark.quick
def test_only_who_knows_the_secret_opens_it_and_nothing_can_be_changed() -> None:
    old, new = Secrets(["old"]), Secrets(["new", "old"])
    sealed = seal(old, "use", b"data")
    assert unseal(new, "use", sealed) == b"data", "while a secret is renewed both are opened"
    assert unseal(new, "use", seal(new, "use", b"")) == b""
    assert seal(old, "use", b"data") != sealed, "each has its own nonce"
    for secrets, use in ((Secrets(["other"]), "use"), (old, "another use")):
        with pytest.raises(ValueError, match="sealed"):
            unseal(secrets, use, sealed)
    for at in range(len(sealed)):
        changed = sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :]
        for wrong in (changed, sealed[:at]):
            with pytest.raises(ValueError, match="sealed"):
                unseal(old, "use", wrong)
    with pytest.raises(ValueError, match="not sealed"):
        unseal(old, "use", Accounts(version=3).encode())
    assert unseal(Secrets(), "use", seal(Secrets(), "use", b"data")) == b"data", "without a secret: as it is"


def test_a_controller_s_answer_to_a_group_shows_no_verifier() -> None:
    with LiveCluster(groups=1, replicas=1, controllers=1, shards=1) as live:
        done = attempt(live, "admin", "user", "add", "root", "--role", "admin")
        token = done.stdout.strip()
        assert attempt(live, "admin", "access", "enable").returncode == 0
        cluster = live.cluster()
        secrets = Secrets(read_secrets(live.secret_file))

        async def ask() -> bytes:
            dialer = TcpDialer(cluster.cluster, login=Node(Member(cluster.cluster, 1, 1), secrets))
            request = pb.AccountsRequest().SerializeToString()
            code, body = parse(await dialer.call(live.controllers[0], "ctl.accounts", request, 20.0))
            await dialer.close()
            assert code is Code.OK
            return body

        body = asyncio.run(ask())
        verifier = Verifier.of(token)
        assert verifier.stored_key not in body and verifier.server_key not in body and b"root" not in body
        assert Accounts.decode(unseal(secrets, "accounts", body)).users["root"].verifier == verifier
        with ShardClerk(live.controllers, login=Login("root", token), timeout=20.0) as clerk:
            clerk.put("k", b"v")  # so the group has opened its own
