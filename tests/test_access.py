"""Access control: who is who, what each role may do, and that everybody else is refused."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench.live import SHARDKV, LiveCluster, attempt
from shardkv import shardkv_pb2 as pb
from shardkv import shardkv_pb2_grpc as kv_grpc
from shardkv.client import Login, PermissionDenied, ShardClerk, ShardKVError, Tls
from shardkv.raft.sealed import seal
from shardkv.server.access import Access
from shardkv.server.accounts_copy import ACCOUNTS_MAGIC, ACCOUNTS_VERSION, AccountsFollower
from shardkv.shardctrler import shardctrler_pb2 as ctl
from shardkv.shardctrler.accounts import Accounts, Role, User, after
from shardkv.shardctrler.planner import Refused
from shardkv.wire import frames
from shardkv.wire.auth import Caller
from shardkv.wire.frames import GET, PUT, SCAN_OP, Limits
from shardkv.wire.node_name import Member
from shardkv.wire.proof import Verifier, key_id
from shardkv.wire.secrets import Secrets

# ---- the rules, pure


def change(accounts: Accounts, **fields: object) -> Accounts:
    return accounts.with_user(ctl.SetUser(**fields))  # type: ignore[arg-type]


@pytest.mark.quick
def test_users_are_made_changed_and_removed_by_rules() -> None:
    accounts = change(Accounts(), name="root", create=True, role="admin", verifier=bytes(64))
    accounts = change(accounts, name="app", create=True, role="read-write", prefixes=[b"app/"])
    accounts = change(accounts, name="app", role="read-only")
    assert accounts.users["app"] == User("app", Role.READ_ONLY, (b"app/",))
    assert accounts.version == 3
    assert Accounts.decode(accounts.encode()) == accounts
    wrong: dict[str, dict[str, Any]] = {
        "UserExists": {"name": "app", "create": True, "role": "admin"},
        "UnknownUser": {"name": "nobody", "role": "admin"},
        "BadUser": {"name": "a:b", "create": True, "role": "admin"},
    }
    for kind, fields in wrong.items():
        with pytest.raises(Refused) as refused:
            change(accounts, **fields)
        assert refused.value.kind == kind
    for fields in (
        {"name": "", "create": True, "role": "admin"},
        {"name": "x", "create": True, "role": "king"},
        {"name": "x", "create": True},
        {"name": "x", "create": True, "role": "admin", "prefixes": [b"p"]},
        {"name": "x", "create": True, "role": "read-only", "prefixes": [b""]},
    ):
        with pytest.raises(Refused) as refused:
            change(accounts, **fields)
        assert refused.value.kind == "BadUser"


@pytest.mark.quick
def test_nobody_is_locked_out_for_good() -> None:
    with pytest.raises(Refused, match="lock everybody out"):
        Accounts().switched(True)
    on = change(Accounts(), name="root", create=True, role="admin").switched(True)
    with pytest.raises(Refused):
        on.without_user("root")
    with pytest.raises(Refused):
        change(on, name="root", role="read-only")


@pytest.mark.quick
def test_the_end_of_a_prefix() -> None:
    assert after(b"app/") == b"app0"
    assert after(b"a\xff") == b"b"
    assert after(b"\xff\xff") == b""
    user = User("u", Role.READ_ONLY, (b"app/", b"\xff"))
    assert (
        user.may_scan(b"app/", b"app0")
        and user.may_scan(b"app/x", b"app/y")
        and user.may_scan(b"\xff", b"\xff\xff")
    )
    assert not user.may_scan(b"app/", b"app1")
    assert not user.may_scan(b"app/", b"")
    assert not user.may_scan(b"", b"app0")


def frame(kind: int, *operations: tuple[int, bytes, bytes]) -> bytes:
    kinds, keys, values = zip(*operations, strict=True)
    seqs = range(1, len(keys) + 1) if kind == frames.WRITE else ()
    section = frames.pack_section(1, b"s" * 16, 0, bytes(kinds), list(seqs), keys, values)
    return frames.pack_frame(kind, 1, 1, [section])


@pytest.fixture
def authorizer() -> Access:
    accounts = Accounts(enabled=False)
    for name, role, prefixes in (
        ("root", "admin", []),
        ("rw", "read-write", []),
        ("ro", "read-only", []),
        ("app", "read-write", [b"app/", b"shared/"]),
    ):
        accounts = change(
            accounts,
            name=name,
            create=True,
            role=role,
            prefixes=prefixes,
            verifier=Verifier.of(f"{name}-token").encode(),
        )
    return Access(lambda: accounts.switched(True), Member("c", 1, 1), Secrets([SECRET]), False, Limits())


SECRET = "the cluster's secret"


def caller(name: str, token: str = "") -> Caller:
    """Who has proven to be `name` by a token: it may have been changed since."""
    return Caller("test", user=name, verifier=Verifier.of(token or f"{name}-token"))


def node(group: int, secret: str = SECRET, replica: int = 2) -> Caller:
    return Caller("test", member=Member("c", group, replica), key=key_id(secret) if secret else b"")


def operator(secret: str = SECRET) -> Caller:
    return Caller("test", operator=True, key=key_id(secret))


WRITE_APP = frame(frames.WRITE, (PUT, b"app/1", b"v"), (PUT, b"shared/1", b"v"))
WRITE_OTHER = frame(frames.WRITE, (PUT, b"app/1", b"v"), (PUT, b"other", b"v"))
READ_OTHER = frame(frames.READ, (GET, b"app/1", b""), (GET, b"other", b""))
SCAN_APP = frame(frames.READ, (SCAN_OP, b"app/", frames.pack_scan(b"app0", 10)))
SCAN_ALL = frame(frames.READ, (SCAN_OP, b"app/", frames.pack_scan(b"", 10)))


# One operation that cannot be read must not let those beside it through.
SCAN_BROKEN = frame(frames.READ, (SCAN_OP, b"app/", b"?"), (GET, b"other", b""))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("who", "method", "payload", "allowed"),
    [
        (caller("root"), "ctl.admin", b"", True),
        (caller("root"), "kv.write", WRITE_OTHER, True),
        (caller("root"), "shard.pull", b"", False),
        (caller("rw"), "kv.write", WRITE_OTHER, True),
        (caller("rw"), "ctl.admin", b"", False),
        (caller("rw"), "raft.members", b"", False),
        (caller("rw"), "ctl.accounts", b"", False),
        (caller("ro"), "kv.read", READ_OTHER, True),
        (caller("ro"), "kv.stale", READ_OTHER, True),
        (caller("ro"), "kv.write", WRITE_APP, False),
        (caller("app"), "kv.write", WRITE_APP, True),
        (caller("app"), "kv.read", SCAN_APP, True),
        (caller("app"), "kv.read", b"no frame", True),  # it is refused as what it is
        (caller("app"), "ctl.changes", b"", True),
        (caller("app", "another token"), "ctl.changes", b"", False),
        (caller("nobody"), "kv.status", b"", False),
        (Caller("test"), "kv.read", READ_OTHER, False),
        (Caller("test", "rw"), "kv.write", WRITE_APP, True),  # by certificate
        (caller("ro", "wrong"), "kv.read", READ_OTHER, False),
        (node(1, secret=""), "raft", b"", True),  # by certificate
        (node(1), "raft", b"", True),
        (node(1, "an old secret"), "raft", b"", False),
        (node(2), "raft", b"", False),
        (node(2), "shard.pull", b"", True),
        (node(2), "kv.write", WRITE_APP, False),
        (node(2), "kv.status", b"", True),
        (node(2), "kv.view", b"", False),
        (node(2), "ctl.claim", ctl.Claim(gid=2).SerializeToString(), True),
        (node(2), "ctl.claim", ctl.Claim(gid=1).SerializeToString(), False),
        (node(2), "ctl.claim", b"\xff", False),
        (node(2), "ctl.admin", ctl.AdminRequest(readdress=ctl.Group(gid=2)).SerializeToString(), True),
        (node(2), "ctl.admin", ctl.AdminRequest(readdress=ctl.Group(gid=1)).SerializeToString(), False),
        (node(2), "ctl.admin", ctl.AdminRequest(leave=ctl.Leave(gids=[2])).SerializeToString(), False),
        (operator(), "ctl.admin", b"", True),
        (operator(), "kv.view", b"", True),
        (operator(), "raft", b"", False),
        (operator("an old secret"), "kv.view", b"", False),
        (caller("root"), "kv.view", b"", True),
        (caller("rw"), "kv.view", b"", False),
        (caller("root"), "raft", b"", False),
    ],
)
def test_who_may_do_what(authorizer: Access, who: Caller, method: str, payload: bytes, allowed: bool) -> None:
    assert (authorizer.refusal(who, method, payload) is None) == allowed


@pytest.mark.quick
@pytest.mark.parametrize(
    ("who", "method", "payload", "forbidden"),
    [
        (caller("app"), "kv.read", SCAN_BROKEN, [True, True]),
        (caller("app"), "kv.stale", SCAN_BROKEN, [True, True]),
        (caller("app"), "kv.write", WRITE_APP, [False, False]),
        (caller("app"), "kv.write", WRITE_OTHER, [False, True]),
        (caller("app"), "kv.read", READ_OTHER, [False, True]),
        (caller("app"), "kv.stale", READ_OTHER, [False, True]),
        (caller("app"), "kv.read", SCAN_APP, [False]),
        (caller("app"), "kv.read", SCAN_ALL, [True]),
        (caller("rw"), "kv.write", WRITE_OTHER, [False, False]),
        (caller("root"), "kv.write", WRITE_OTHER, [False, False]),
        (operator(), "kv.write", WRITE_OTHER, [False, False]),
    ],
)
def test_a_forbidden_operation_is_marked_and_its_neighbours_are_not(
    authorizer: Access, who: Caller, method: str, payload: bytes, forbidden: list[bool]
) -> None:
    assert authorizer.refusal(who, method, payload) is None
    (section,) = frames.unpack_sections(authorizer.admitted(who, method, payload))
    (before,) = frames.unpack_sections(payload)
    assert [kind == frames.FORBIDDEN for kind in section.kinds] == forbidden
    assert (section.keys, section.values, section.seqs) == (before.keys, before.values, before.seqs)


@pytest.mark.quick
def test_what_is_no_frame_passes_the_gate_and_is_refused_as_what_it_is(authorizer: Access) -> None:
    assert authorizer.admitted(caller("app"), "kv.read", b"no frame") == b"no frame"


@pytest.mark.quick
def test_secrets_are_in_no_repr() -> None:
    shown = repr(
        [Login("me", "hidden"), caller("me", "hidden"), User("me", Role.ADMIN, (), Verifier.of("hidden"))]
    )
    assert "hidden" not in shown and repr(Verifier.of("hidden").stored_key) not in shown


# ---- real processes


@pytest.fixture(scope="module")
def live() -> Iterator[LiveCluster]:
    with LiveCluster(groups=2, replicas=1, controllers=1, shards=2) as cluster:
        yield cluster


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "that did not come to be"
        time.sleep(0.02)


def shardkv(live: LiveCluster, *arguments: str, login: Login | None = None) -> subprocess.CompletedProcess[str]:
    """As a user or, without a login, as a stranger."""
    who = {} if login is None else {"SHARDKV_USER": login.name, "SHARDKV_TOKEN": login.token}
    who["SHARDKV_SECRET_FILE"] = ""
    return attempt(live, *arguments, **who)


def denied(work: Callable[[], object]) -> bool:
    try:
        work()
    except PermissionDenied:
        return True
    return False


def test_a_cluster_is_locked_used_by_role_and_unlocked(live: LiveCluster, tmp_path: Path) -> None:
    with live.clerk() as clerk:  # as it is without access control
        clerk.put("app/1", "one")
        clerk.put("other", "two")
    # Where nobody is asked who he is, groups serve without controllers, also after a restart.
    served = (
        grpc.StatusCode.OK,
        grpc.StatusCode.FAILED_PRECONDITION,
    )  # the latter: the key is the other group's
    restart_groups_alone(live, lambda address: get_stale(address) in served)
    refused = shardkv(live, "admin", "access", "enable")
    assert refused.returncode == 1 and "lock everybody out" in refused.stderr
    root = Login("root", shardkv(live, "admin", "user", "add", "root", "--role", "admin").stdout.strip())
    added = shardkv(live, "admin", "user", "add", "app", "--role", "read-write", "--prefix", "app/")
    app = Login("app", added.stdout.strip())
    assert shardkv(live, "admin", "access", "enable").returncode == 0

    with (
        ShardClerk(live.controllers, timeout=10) as stranger,
        pytest.raises(PermissionDenied, match="who are you"),
    ):
        stranger.get("app/1")
    anonymous = shardkv(live, "get", "app/1")
    assert anonymous.returncode == 1 and "PermissionDenied" in anonymous.stderr
    assert shardkv(live, "admin", "status").returncode == 1
    assert shardkv(live, "admin", "user", "list", login=app).returncode == 1, "no admin"
    listed = shardkv(live, "admin", "user", "list", login=root).stdout
    assert "access control is on" in listed and "app/" in listed and app.token not in listed

    with ShardClerk(live.controllers, timeout=10, login=app) as clerk:
        eventually(lambda: not denied(lambda: clerk.put("app/1", "three")))  # groups hear of it in a moment
        assert clerk.get("app/1") == b"three"
        assert list(clerk.scan("app/", "app0")) == [(b"app/1", b"three")]
        for work in (lambda: clerk.get("other"), lambda: clerk.put("other", "x"), lambda: list(clerk.scan())):
            with pytest.raises(PermissionDenied, match="may not touch"):
                work()
        # The cluster itself goes on: shards move between groups, and configurations are learnt.
        moved = shardkv(live, "admin", "leave", "2", "--wait", login=root)
        assert moved.returncode == 0, moved.stderr
        assert clerk.get("app/1") == b"three"
        group = next(process.address for process in live.cluster().processes if process.role == "group")
        with grpc.insecure_channel(group) as channel:
            stub = kv_grpc.KVStub(channel)
            bearer = [("authorization", f"Bearer {app.name}:{app.token}")]
            assert stub.Get(pb.GetRequest(key=b"app/1"), timeout=10, metadata=bearer).value == b"three"
            for key, metadata in ((b"app/1", []), (b"other", bearer)):
                with pytest.raises(grpc.RpcError) as error:
                    stub.Get(pb.GetRequest(key=key), timeout=10, metadata=metadata)
                assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED

        backup = ["backup", "create", f"file://{tmp_path}/backups"]
        mine = shardkv(live, *backup, login=app)
        assert mine.returncode == 1 and "only an admin" in mine.stderr, "a backup has everybody's keys"
        assert shardkv(live, *backup, login=root).returncode == 0

        # A role that is taken away is gone in a moment, on connections that are open.
        assert shardkv(live, "admin", "user", "set", "app", "--role", "read-only", login=root).returncode == 0
        eventually(lambda: denied(lambda: clerk.put("app/1", "four")))
        assert clerk.get("app/1") == b"three"

        # A group judges by what it knew when it starts while no controller answers.
        restart_groups_alone(live, lambda address: get_stale(address) is grpc.StatusCode.PERMISSION_DENIED)
        eventually(lambda: clerk.get("app/1") == b"three")

    token_file = tmp_path / "token"
    token_file.write_text(root.token + "\n")
    listed = shardkv(live, "admin", "user", "list", "--user", "root", "--token-file", str(token_file)).stdout
    assert "root" in listed
    fresh = shardkv(live, "admin", "user", "token", "root", login=root).stdout.strip()
    assert shardkv(live, "admin", "user", "list", login=root).returncode == 1, "the old token is worth nothing"
    assert shardkv(live, "admin", "access", "disable", login=Login("root", fresh)).returncode == 0
    with live.clerk() as clerk:
        eventually(lambda: not denied(lambda: clerk.get("other")))

    secret = (live.directory / "secret").read_text().strip()
    logs = "".join(
        path.read_text() for path in (*live.directory.glob("*/log"), *live.directory.glob("*/audit.log"))
    )
    check_audit(live)
    for text in (root.token, app.token, secret):
        assert text not in logs
        for process in live.cluster().processes:
            assert text.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()


def check_audit(live: LiveCluster) -> None:
    """What the story above left in the audit logs."""
    paths = list(live.directory.glob("*/audit.log"))
    assert len(paths) == 3 and all(path.stat().st_mode & 0o777 == 0o600 for path in paths)
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    assert all(line.keys() >= {"time", "kind"} for line in lines)

    def told(**fields: object) -> list[dict[str, str]]:
        return [line for line in lines if fields.items() <= line.items()]

    written = told(kind="denied", who="app", what="kv.write", allowed=False)
    assert written and all(line["address"].startswith("127.0.0.1:") and line["why"] for line in written)
    by_grpc = told(kind="denied", door="grpc", what="kv.read")
    assert {line["who"] for line in by_grpc} == {"", "app"}
    assert all(line["address"].startswith("127.0.0.1:") for line in by_grpc)
    assert told(kind="denied", who="app", what="ctl.users")
    assert told(kind="login refused", who="root", allowed=False), "the old token"
    assert told(kind="login", who="app", allowed=True)
    assert told(kind="read-all", who="root", what="kv.view", allowed=True)
    changes = [line["what"] for line in told(kind="admin", allowed=True)]
    for began in (
        'user add: name: "root"',
        'user add: name: "app"',
        'user set: name: "app"',
        'user set: name: "root"',
        "access enable",
        "access disable",
        "leave: gids: 2",
    ):
        assert any(change.startswith(began) for change in changes), (began, changes)


def get_stale(address: str) -> grpc.StatusCode:
    """How a stranger's read is answered by one replica, whatever the key's group is."""
    with grpc.insecure_channel(address) as channel:
        try:
            kv_grpc.KVStub(channel).Get(pb.GetRequest(key=b"app/1", stale=True), timeout=5)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def restart_groups_alone(live: LiveCluster, expected: Callable[[str], bool]) -> None:
    """Kill everything, start the groups, wait for what is expected of each; then the controllers."""
    cluster = live.cluster()
    for process in cluster.processes:
        cluster.kill(process)
    groups = [process for process in cluster.processes if process.role == "group"]
    for process in groups:
        cluster.start(process)
    for process in groups:
        eventually(lambda address=process.address: expected(address))  # type: ignore[misc]
    for process in cluster.processes:
        if process.role == "controller":
            cluster.start(process)
    live.up()


@pytest.mark.quick
def test_what_a_group_was_told_last_is_known_even_if_that_is_nothing() -> None:
    async def keep(data: bytes) -> None:
        raise AssertionError

    told = seal(ACCOUNTS_MAGIC, ACCOUNTS_VERSION, Accounts().encode())
    assert AccountsFollower(told, keep, True).accounts == Accounts()
    assert AccountsFollower(None, keep, False).accounts == Accounts(), "no secret, no access control"
    assert AccountsFollower(None, keep, True).accounts is None, "it might be on: nobody is let in yet"


@pytest.mark.quick
def test_a_flipped_bit_in_the_users_opens_no_door() -> None:
    """The file had no checksum: one bit of `enabled` switched access control off for a group."""

    async def keep(data: bytes) -> None:
        raise AssertionError

    admin = User("root", Role.ADMIN, verifier=Verifier.of("t"))
    told = seal(ACCOUNTS_MAGIC, ACCOUNTS_VERSION, Accounts(1, True, {"root": admin}).encode())
    for bit in range(8 * len(told)):
        flipped = bytearray(told)
        flipped[bit // 8] ^= 1 << bit % 8
        for secured in (True, False):
            assert AccountsFollower(bytes(flipped), keep, secured).accounts is None, "nobody is let in"


def test_users_and_processes_are_known_by_their_certificates(tmp_path: Path) -> None:
    def certify(name: str, *options: str) -> Tls:
        command = [*SHARDKV, "certs", str(tmp_path), "--name", name, *options]
        subprocess.run(command, check=True, capture_output=True)
        return Tls(tmp_path / f"{name}.pem", tmp_path / f"{name}.key", tmp_path / "ca.pem")

    node, root, guest = certify("node"), certify("root", "--client"), certify("guest", "--client")
    options = {"tls_cert": node.cert, "tls_key": node.key, "tls_ca": node.ca}
    with LiveCluster(groups=1, replicas=3, controllers=1, shards=2, **options) as live:
        with_root = ["--tls-cert", str(root.cert), "--tls-key", str(root.key), "--tls-ca", str(root.ca)]
        add = ["admin", "user", "add", "root", "--role", "admin", "--certificate-only"]
        assert shardkv(live, *add, *with_root).returncode == 0
        enabled = shardkv(live, "admin", "access", "enable", *with_root)
        assert enabled.returncode == 0, enabled.stderr
        with ShardClerk(live.controllers, timeout=10, tls=root) as clerk:
            clerk.put("k", "v")
            assert clerk.get("k") == b"v"
        with (
            ShardClerk(live.controllers, timeout=10, tls=guest) as clerk,
            pytest.raises(ShardKVError, match="who are"),
        ):
            clerk.get("k")
        (live.directory / "secret").unlink()  # the certificates are enough for the processes
        cluster = live.cluster()
        for process in list(cluster.processes):
            cluster.kill(process)
            cluster.start(process)
        with ShardClerk(live.controllers, timeout=30, tls=root) as clerk:
            clerk.put("k", "w")
            assert clerk.get("k", consistency="any") == b"w"
