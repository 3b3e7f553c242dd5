"""Whether a request comes from a page of ours, and not from another site's page in the same browser. Pure.

A site can give its own name our address (DNS rebinding), and its page then asks us as if we were that site: so the
name in `Host` has to be one of ours. An address needs no name, and cannot be rebound. A site can also send
its visitors' browsers here: nothing here changes anything (GET alone), and what a script of another site asks for
is refused by `Origin` and `Sec-Fetch-Site`. A link to the page works.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from typing import NamedTuple


class Why(NamedTuple):
    """Why not, as HTTP says it."""

    status: int
    text: str


def why_foreign(method: str, headers: Mapping[str, str], names: Collection[str]) -> Why | None:
    """None: it may be answered. `names`: hosts that are ours; addresses and localhost are always."""
    if method not in ("GET", "HEAD"):
        return Why(405, "there is nothing here to be changed")
    host = headers.get("Host", "")
    if not _is_ours(host, names):
        return Why(
            421,
            f"{host[:100]!r} is no name of this page: ask by address, or start the controller with --web-host",
        )
    origin = headers.get("Origin")
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        return Why(403, "another site's page asks")
    if headers.get("Sec-Fetch-Site") == "cross-site" and headers.get("Sec-Fetch-Mode") != "navigate":
        return Why(403, "another site's page asks")
    return None


def _is_ours(host: str, names: Collection[str]) -> bool:
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    name = name.lower().rstrip(".")
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return name == "localhost" or name in {each.lower() for each in names}
