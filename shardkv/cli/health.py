"""health: is the replica at an address well? For probes of containers, and for scripts."""

from __future__ import annotations

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from shardkv.cli.common import REFUSED, UNREACHABLE, Failed, Seconds, handled, output_option
from shardkv.cli.options import find_tls, tls_options
from shardkv.cli.output import print_json
from shardkv.wire.address import split_addresses


@click.command()
@click.argument("address", metavar="HOST:PORT")
@click.option("--alive", is_flag=True, help="Enough that it answers at all.")
@click.option("--timeout", type=Seconds(), default=3.0, show_default=True, help="Seconds.")
@tls_options
@output_option
@handled
def health(address: str, alive: bool, timeout: float, output: str) -> None:
    """Ask the replica at HOST:PORT whether it serves: it does while it knows a leader."""
    try:
        (where,) = split_addresses(address)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    tls = find_tls()
    if tls is None:
        channel = grpc.insecure_channel(where)
    else:
        channel = grpc.secure_channel(
            where,
            grpc.ssl_channel_credentials(
                tls.ca.read_bytes(), private_key=tls.key.read_bytes(), certificate_chain=tls.cert.read_bytes()
            ),
        )
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout, wait_for_ready=False
            )
        except grpc.RpcError as error:
            raise Failed(f"{where} does not answer: {error.code().name}", UNREACHABLE) from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if output == "json":
        print_json({"ok": alive or status == "SERVING", "status": status})
    if not alive and answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Failed(f"{where} says {status}", REFUSED)
    if output != "json":
        click.echo(status)
