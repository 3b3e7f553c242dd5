"""certs: a certificate authority for tests and trials, and certificates that it signed."""

from __future__ import annotations

from pathlib import Path

import click

from shardkv.cli.common import MOST, Failed, Utf8, handled, output_option
from shardkv.cli.output import print_json
from shardkv.wire.node_name import NodeName

HOSTS = ("127.0.0.1", "localhost")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--host", "hosts", multiple=True, default=HOSTS, show_default=True, help="Under which a process is dialled."
)
@click.option("--client", is_flag=True, help="For the user NAME, not for a process of the cluster.")
@click.option("--name", type=Utf8(), default="node", show_default=True, help="NAME.pem and NAME.key are made.")
@click.option("--cluster", default="shardkv", show_default=True, help="The id of a process's cluster.")
@click.option("--group", type=click.IntRange(0, MOST), help="Its group; 0: the controller. By default any.")
@click.option("--replica", type=click.IntRange(1, MOST), help="Its number in the group (--id). By default any.")
@output_option
@handled
def certs(
    directory: Path,
    hosts: tuple[str, ...],
    client: bool,
    name: str,
    cluster: str,
    group: int | None,
    replica: int | None,
    output: str,
) -> None:
    """Make DIRECTORY/ca.pem, unless it is there, and a certificate NAME that it signs.

    A certificate without --group and --replica is for every process of the cluster: whoever steals its
    key is all of them. The CA is for tests and trials: its key lies beside it. Use the files with
    --tls-cert, --tls-key and --tls-ca.
    """
    try:
        from shardkv.process.certificates import Authority
    except ImportError:
        raise Failed("certs needs the package cryptography: pip install 'shardkv[certs]'") from None
    if replica is not None and group is None:
        raise click.UsageError("--replica is a number in a group: give --group, too")
    named = NodeName(cluster, group, replica)
    if NodeName.parse(named.uri) != named:
        raise click.UsageError(
            f"--cluster {cluster!r}: a cluster's id has 1 to 128 characters, no space and no slash"
        )
    authority = Authority(directory)
    authority.ensure()
    try:
        if client:
            authority.for_user(name, directory / name)
        else:
            authority.for_process(named, hosts, directory / name)
    except ValueError as error:
        raise Failed(f"no certificate can say that: {error}; give --name and --host in ASCII") from None
    files = {
        "cert": f"{directory / name}.pem",
        "key": f"{directory / name}.key",
        "ca": str(authority.certificate),
    }
    if output == "json":
        print_json({"ok": True, **files})
    else:
        click.echo(" ".join(f"--tls-{kind} {path}" for kind, path in files.items()))
