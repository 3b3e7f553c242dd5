"""What all commands share: where the cluster is, how results and errors look, exit statuses.

0 done    1 refused or failed    2 usage    3 not reachable, or timed out
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from raft.address import split_addresses
from raft.gate import Login, Operator
from raft.tls import BadCertificate, Tls
from shardkv.secret_file import MANIFEST, SECRET, BadSecretFile, read_secrets

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
REFUSED, UNREACHABLE = 1, 3
DEFAULT_DATA = "data"

PLAIN_COLUMNS = 140  # where the output is no terminal


@cache
def console() -> Console:
    """Where tables and progress go. Imported when first used: `get` and `health` need no tables."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PLAIN_COLUMNS)


class Failed(Exception):
    """A command failed: one line for people, and the exit status."""

    def __init__(self, text: str, status: int = REFUSED) -> None:
        super().__init__(text)
        self.status = status


def fail(text: str, status: int) -> None:
    click.echo(f"shardkv: {text}", err=True)
    sys.exit(status)


def handled(command: Callable[..., T]) -> Callable[..., T]:
    """Errors that users can cause end in one line and the right exit status."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> T:
        try:
            return command(*arguments, **options)
        except Failed as error:
            fail(str(error), error.status)
        except KeyboardInterrupt:
            sys.exit(130)
        except click.exceptions.Exit:
            raise
        except Exception as error:
            told = _explain(error)
            if told is None:  # a bug of ours, or click's own: those say themselves what they are
                raise
            fail(*told)
        raise AssertionError("fail() does not return")

    return run


def _explain(error: Exception) -> tuple[str, int] | None:
    """One line and the exit status for an error that a user can cause; None for any other."""
    # Imported here, since most commands end well and the rest can wait.
    from client.errors import DeadlineExceeded, ShardKVError, Unavailable
    from shardctrler.query import AccessDenied, AdminRefused, BadQuery, ControllerUnavailable
    from shardkv.backup.errors import BackupError

    match error:
        case ControllerUnavailable() | Unavailable() | DeadlineExceeded():
            return f"{error}. Is the cluster up? `shardkv admin status` shows what answers", UNREACHABLE
        case AccessDenied():
            return f"PermissionDenied: {error}", REFUSED
        case AdminRefused():
            return f"refused ({error.kind}): {error}", REFUSED
        case BackupError():
            return str(error), REFUSED
        case BadQuery() | ShardKVError() | BadCertificate() | BadSecretFile():
            return f"{type(error).__name__}: {error}", REFUSED
    return None


def find_controllers(given: str | None) -> tuple[str, ...]:
    """From the option, the environment, or ./data/cluster.json. Raises Failed."""
    manifest = Path(DEFAULT_DATA) / MANIFEST
    if given:
        try:
            addresses = split_addresses(given)
        except ValueError as error:
            raise click.UsageError(f"--controllers: {error}") from None
        # The secret in ./data is that of the cluster in ./data, and is proven to no other.
        ours = manifest.exists() and set(addresses) <= set(json.loads(manifest.read_text())["controllers"])
        _login["elsewhere"] = not ours
        return addresses
    if manifest.exists():
        return tuple(json.loads(manifest.read_text())["controllers"])
    raise click.UsageError(
        "no cluster named: give --controllers host:port,…, set SHARDKV_CONTROLLERS, "
        f"or stand where {manifest} is"
    )


_tls_files: dict[str, Path] = {}  # as the command line or the environment gave them: "cert", "key", "ca"


def _note_tls(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    if value is not None and parameter.name is not None:
        _tls_files[parameter.name.removeprefix("tls_")] = value


def tls_options(command: Callable[..., T]) -> Callable[..., T]:
    """--tls-cert, --tls-key, --tls-ca and --tls-crl; `find_tls` has what they say."""
    for name, text in (
        ("crl", "PEM file of the certificates that the CA has revoked."),
        ("ca", "PEM file of the CA that signs the cluster's certificates."),
        ("key", "PEM file of its key."),
        ("cert", "PEM file of our certificate, if the cluster speaks TLS."),
    ):
        command = click.option(
            f"--tls-{name}",
            envvar=f"SHARDKV_TLS_{name.upper()}",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            callback=_note_tls,
            expose_value=False,
            help=text,
        )(command)
    return command


def use_tls(files: dict[str, str]) -> None:
    """What a manifest says, for this command; the command line's word comes first."""
    if not _tls_files:
        _tls_files.update({name: Path(path) for name, path in files.items()})


def find_tls() -> Tls | None:
    """From the options, the environment, or ./data/cluster.json; None for a cluster without TLS."""
    if _tls_files:
        missing = [f"--tls-{name}" for name in ("cert", "key", "ca") if name not in _tls_files]
        if missing:
            raise click.UsageError(f"TLS takes all three files: {', '.join(missing)} is missing")
        return Tls(**_tls_files)
    manifest = Path(DEFAULT_DATA) / MANIFEST
    found = json.loads(manifest.read_text()).get("tls") if manifest.exists() else None
    return Tls(**{name: Path(path) for name, path in found.items()}) if found else None


def read_secret(path: Path) -> str:
    """A token or secret from its file. Never from the command line, where everybody sees it."""
    try:
        secret = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path}: {error}") from None
    if not secret or "\0" in secret:
        raise click.UsageError(f"{path} has no secret in it")
    return secret


_login: dict[str, Any] = {}


def _note_login(context: click.Context, parameter: click.Parameter, value: object) -> None:
    if value is not None and parameter.name is not None:
        _login[parameter.name] = value


def login_options(command: Callable[..., T]) -> Callable[..., T]:
    """--user and --token-file; `find_login` has what they say."""
    command = click.option(
        "--secret-file",
        envvar="SHARDKV_SECRET_FILE",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        callback=_note_login,
        expose_value=False,
        help="File with the cluster's secret: whoever can read it may do what an admin may.",
    )(command)
    command = click.option(
        "--user",
        envvar="SHARDKV_USER",
        callback=_note_login,
        expose_value=False,
        help="Who we are, if the cluster asks; the token is in --token-file or SHARDKV_TOKEN.",
    )(command)
    return click.option(
        "--token-file",
        envvar="SHARDKV_TOKEN_FILE",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        callback=_note_login,
        expose_value=False,
        help="File with our token.",
    )(command)


def use_secret(file: Path) -> None:
    """This command is the operator's, whatever the command line says."""
    _login.clear()
    _login["secret_file"] = file


def find_login() -> Login | Operator | None:
    """Who we are, from the options or the environment: a user, or the operator, who has the cluster's secret.

    In a directory with ./data/cluster.json that cluster's secret is the default, where we may read it.
    """
    user, file = _login.get("user"), _login.get("token_file")
    if user:
        token = read_secret(file) if file is not None else os.environ.get("SHARDKV_TOKEN", "").strip()
        if not token:
            raise click.UsageError(f"--user {user}: its token belongs into --token-file, or into SHARDKV_TOKEN")
        return Login(user, token)
    found = find_secret_file()
    return Operator(read_secrets(found)[0]) if found is not None else None


def find_secret_file() -> Path | None:
    """From the options, the environment, or beside ./data/cluster.json; None where there is none."""
    given: Path | None = _login.get("secret_file")
    if given is not None:
        return given
    default = Path(DEFAULT_DATA) / SECRET
    ours = default.with_name(MANIFEST).exists() and os.access(default, os.R_OK)
    return default if ours and not _login.get("elsewhere") else None


def controllers_option(command: Callable[..., T]) -> Callable[..., T]:
    """Where the cluster is, and how it is spoken to."""
    return click.option(
        "--controllers",
        envvar="SHARDKV_CONTROLLERS",
        metavar="HOST:PORT,…",
        help="Controller replicas; the default is ./data/cluster.json.",
    )(tls_options(login_options(command)))


output_option = click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", help="For people, or for scripts."
)
timeout_option = click.option("--timeout", default=10.0, show_default=True, help="Seconds.")


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """On the loop that the blocking clerks use: one for the whole command."""
    from client.blocking import background_loop

    return asyncio.run_coroutine_threadsafe(work, background_loop()).result()


def print_json(value: object) -> None:
    click.echo(json.dumps(value))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    console().print(table)


def text(data: bytes) -> str:
    """Bytes for a terminal: UTF-8 where they are that, escapes where not."""
    return data.decode("utf-8", errors="backslashreplace")


def json_bytes(data: bytes) -> object:
    """Bytes for JSON: a string where they are UTF-8, else {"base64": …}."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}
