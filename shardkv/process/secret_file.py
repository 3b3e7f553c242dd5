"""The file with the cluster's secrets: one a line, the first is the one that this process proves itself by.

The process looks at the file every second, so an operator can renew a secret without a restart
(docs/security.md, "Drill: another secret"). A file that cannot be read, or has nothing sound in it,
changes nothing: the process goes on with the secrets that it has, and says so.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from shardkv.wire.secrets import MAX_SECRETS, Secrets

log = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
MAX_BYTES = 16 << 10
MANIFEST, SECRET = "cluster.json", "secret"  # of `shardkv up`, in its directory


class BadSecretFile(Exception):
    """The text names the file and says what is wrong with it."""


def read_secrets(path: Path) -> list[str]:
    """Raises BadSecretFile."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSecretFile(f"{path}: {error}") from None
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found or "\0" in text or len(text) > MAX_BYTES:
        raise BadSecretFile(f"{path} has no secret in it")
    if len(found) > MAX_SECRETS:
        raise BadSecretFile(f"{path} has {len(found)} secrets, one a line; at most {MAX_SECRETS} are accepted")
    return found


def write_secrets(path: Path, lines: Sequence[str]) -> None:
    """Replace the file whole; readable by its owner alone."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def beside(data: Path) -> Path | None:
    """The secret of the cluster that `up` started in the directory above `data`, if that is where `data` is."""
    found = data.resolve().parent / SECRET
    return found if found.exists() and found.with_name(MANIFEST).exists() else None


def fresh_secret() -> str:
    return secrets.token_urlsafe(32)


async def watch(path: Path, known: Secrets) -> None:
    """Keep `known` what the file says, for as long as this process runs."""
    said = ""
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        try:
            found = await asyncio.to_thread(read_secrets, path)
        except BadSecretFile as error:
            if str(error) != said:
                log.error("%s; going on with the secrets known so far", error)
            said = str(error)
            continue
        said = ""
        if found != list(known):
            log.info("the cluster's secrets have changed: %d are accepted now", len(found))
            known.replace(found)
