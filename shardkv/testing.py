"""A throwaway cluster for the tests of applications: real processes on free ports of loopback::

    def test_ada(shardkv_clerk):
        shardkv_clerk.put("user/1", "Ada")

With pytest the fixtures are there as soon as `shardkv[server]` is installed: `shardkv_cluster` is one
cluster for the whole session, `shardkv_clerk` a clerk on it. Each test starts on an empty key space:
`shardkv_clerk` deletes every key when the test ends. Without pytest, `ThrowawayCluster` is a context manager.

By default a cluster is one controller and one group of one replica, with its data in memory: it starts in
about a second. Ask for `replicas=3, ephemeral=False` where a test is about failures.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from shardkv.process.local_cluster import Cluster
from shardkv.process.secret_file import MANIFEST, read_secrets

if TYPE_CHECKING:
    from shardkv.client import AsyncShardClerk, Operator, ShardClerk

SHARDKV = [sys.executable, "-m", "shardkv.cli.main"]
COMMAND_SECONDS = 700.0
LOG_TAIL_BYTES = 1500


class ClusterFailed(Exception):
    """A command on the throwaway cluster failed; the text has its output."""


class ThrowawayCluster:
    """A cluster in a scratch directory, started and stopped by `with`, and removed at the end.

    The options are those of `shardkv up`, with underscores for dashes: `replicas=3`, `web_port=7500`;
    True stands for a flag, and False for a flag that is left out.
    """

    def __init__(
        self,
        groups: int = 1,
        replicas: int = 1,
        controllers: int = 1,
        ephemeral: bool = True,
        **options: object,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="shardkv-"))
        given = {"groups": groups, "replicas": replicas, "controllers": controllers, "ephemeral": ephemeral}
        self._options = ["--port", "0"]
        for name, value in (given | options).items():
            option = f"--{name.replace('_', '-')}"
            if value is True:
                self._options.append(option)
            elif value is not False:
                self._options += [option, str(value)]

    def __enter__(self) -> Self:
        try:
            self.up()
        except BaseException:  # `with` does not call __exit__ for us here
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for log in sorted(self.directory.glob("*/log")):
                tail = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
                print(f"--- {log.parent.name}\n{tail}", file=sys.stderr)
        self.cluster().stop_all()
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.directory)

    def up(self) -> str:
        """Start what is down; returns when every shard serves. Raises ClusterFailed."""
        # One that was there starts as it is: groups may have joined since.
        is_new = not (self.directory / MANIFEST).exists()
        return self.run("up", "--data", str(self.directory), "--detach", *(self._options if is_new else ()))

    def cluster(self) -> Cluster:
        """The processes as they are now, each of which can be killed and started again."""
        return Cluster.load(self.directory)

    @property
    def controllers(self) -> list[str]:
        """The addresses that a clerk is given."""
        return self.cluster().addresses("controller", 0)

    @property
    def secret_file(self) -> Path:
        """What the processes know each other by, and their operator by."""
        return self.cluster().secret_file

    @property
    def environment(self) -> dict[str, str]:
        """By which a command finds the cluster, as its operator."""
        found = {"SHARDKV_CONTROLLERS": ",".join(self.controllers)}
        return found | ({"SHARDKV_SECRET_FILE": str(self.secret_file)} if self.secret_file.exists() else {})

    @property
    def operator(self) -> Operator:
        """The login of whoever may do what an admin may."""
        from shardkv.client import Operator

        return Operator(read_secrets(self.secret_file)[0])

    def run(self, *arguments: str, check: bool = True) -> str:
        """Run `shardkv ARGUMENTS` against the cluster; returns its standard output.

        Raises ClusterFailed if the command fails and `check` is true.
        """
        environment = os.environ | ({} if arguments[0] == "up" else self.environment)
        done = subprocess.run(
            [*SHARDKV, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if check and done.returncode:
            told = f"{done.stderr}{done.stdout}".strip()
            raise ClusterFailed(f"shardkv {' '.join(arguments)}: exit {done.returncode}: {told}")
        return done.stdout

    def clerk(self, timeout: float = 30.0) -> ShardClerk:
        """A new blocking clerk; the caller closes it."""
        from shardkv.client import ShardClerk

        return ShardClerk(self.controllers, timeout=timeout)

    def async_clerk(self, timeout: float = 30.0) -> AsyncShardClerk:
        """A new clerk for asyncio; the caller closes it."""
        from shardkv.client import AsyncShardClerk

        return AsyncShardClerk(self.controllers, timeout=timeout)

    def clear(self) -> None:
        """Delete every key."""
        with self.clerk() as clerk:
            _clear(clerk)


def _clear(clerk: ShardClerk) -> None:
    with clerk.batch() as batch:
        for key, _ in clerk.scan():
            batch.delete(key)


try:
    import pytest
except ModuleNotFoundError:  # the context manager needs no pytest
    pass
else:

    @pytest.fixture(scope="session")
    def shardkv_cluster() -> Iterator[ThrowawayCluster]:
        """One throwaway cluster for all tests of this session (with pytest-xdist: one for each worker)."""
        with ThrowawayCluster() as cluster:
            yield cluster

    @pytest.fixture
    def shardkv_clerk(shardkv_cluster: ThrowawayCluster) -> Iterator[ShardClerk]:
        """A clerk on `shardkv_cluster`, whose keys are deleted when the test ends."""
        with shardkv_cluster.clerk() as clerk:
            yield clerk
            _clear(clerk)
