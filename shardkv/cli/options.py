"""The options that all commands share: where the cluster is, its certificates, and who asks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click

from shardkv.cli.common import Failed
from shardkv.process.secret_file import MANIFEST, SECRET, read_secrets
from shardkv.wire.address import split_addresses
from shardkv.wire.auth import Login, Operator
from shardkv.wire.bounded_json import parse_json
from shardkv.wire.tls import Tls

T = TypeVar("T")

DEFAULT_DATA = "data"
TLS_FILES = {"cert", "key", "ca", "crl"}
_tls_files: dict[str, Path] = {}  # as the command line or the environment gave them: "cert", "key", "ca"
_login: dict[str, Any] = {}


def _manifest() -> dict[str, Any] | None:
    """What ./data/cluster.json says; None where there is none. Raises Failed."""
    path = Path(DEFAULT_DATA) / MANIFEST
    if not path.exists():
        return None
    try:
        found = parse_json(path.read_text())
        if not isinstance(found, dict) or not isinstance(found.get("controllers"), list):
            raise ValueError("it names no controllers")
        split_addresses(",".join(map(str, found["controllers"])))
        files = found.get("tls", {})
        if not isinstance(files, dict) or not set(files) <= TLS_FILES or set(map(type, files.values())) > {str}:
            raise ValueError("its TLS files are no paths")
    except (OSError, ValueError) as error:
        raise Failed(f"{path} cannot be used: {error}; name the cluster with --controllers") from None
    return found


def find_controllers(given: str | None) -> tuple[str, ...]:
    """From the option, the environment, or ./data/cluster.json. Raises Failed."""
    if given:
        try:
            addresses = split_addresses(given)
        except ValueError as error:
            raise click.UsageError(f"--controllers: {error}") from None
        # The secret in ./data is that of the cluster in ./data, and is proven to no other.
        _login["elsewhere"] = not _is_ours(addresses)
        return addresses
    if (manifest := _manifest()) is not None:
        return tuple(manifest["controllers"])
    raise click.UsageError(
        "no cluster named: give --controllers host:port,…, set SHARDKV_CONTROLLERS, "
        f"or stand where {Path(DEFAULT_DATA) / MANIFEST} is"
    )


def _is_ours(addresses: Collection[str]) -> bool:
    """Whether these are of the cluster in ./data."""
    try:
        manifest = _manifest()
    except Failed:
        return False
    return manifest is not None and set(addresses) <= set(manifest["controllers"])


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
    found = (_manifest() or {}).get("tls")
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


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """On the loop that the blocking clerks use: one for the whole command."""
    from shardkv.client.blocking import background_loop

    return asyncio.run_coroutine_threadsafe(work, background_loop()).result()
