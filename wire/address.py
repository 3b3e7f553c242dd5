"""What an address is: `host:port`. One check for everything that comes from outside.

A name that no host has, or a port that TCP does not have, would fail only when somebody
connects there, far from whoever sent the address.
"""

from __future__ import annotations

MAX_HOST_BYTES = 255  # as in the DNS


def split_address(address: str) -> tuple[str, int]:
    """Host (without the brackets of IPv6) and port. Raises ValueError that shows the address."""
    host, _, port = address[: MAX_HOST_BYTES + 8].rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    sound = (
        len(address) <= MAX_HOST_BYTES + 6
        and 0 < len(host) <= MAX_HOST_BYTES
        and host.isprintable()
        and not any(c.isspace() or c in "/@,[]" for c in host)
        and port.isascii()
        and port.isdecimal()
        and 0 < int(port) < 65536
    )
    if not sound:
        raise ValueError(f"{address[:64]!r} is not host:port with a port from 1 to 65535")
    return host, int(port)


def host_of(peer: str) -> str:
    """The host of an address that a socket told: without the brackets of IPv6."""
    return peer.rpartition(":")[0].removeprefix("[").removesuffix("]")


def split_addresses(text: str) -> tuple[str, ...]:
    """host:port,… to a tuple. Raises ValueError."""
    addresses = [part.strip() for part in text.split(",") if part.strip()]
    for address in addresses:
        split_address(address)
    if len(set(addresses)) != len(addresses):
        raise ValueError("an address stands twice")
    if not addresses:
        raise ValueError("no addresses")
    return tuple(addresses)
