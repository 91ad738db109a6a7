"""This host's addresses, names -> addresses, and whether a port answers. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_SIOCGIFADDR = 0x8915
BRIDGES = ("docker", "virbr", "br-", "lxc", "podman", "cni", "veth")  # inside one host only: no other host reaches it

Interfaces = Mapping[str, Sequence[str]]


def interfaces() -> dict[str, list[str]]:
    """Name of each network interface -> its addresses."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for name in found:
            with contextlib.suppress(OSError):  # no IPv4 address
                answer = fcntl.ioctl(asker.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name].append(socket.inet_ntoa(answer[20:24]))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            address = ipaddress.IPv6Address(int(digits, 16))
            if name in found and not address.is_link_local:
                found[name].append(str(address))
    return found


def resolve(name: str) -> tuple[list[str], str | None]:
    """A name's addresses, and why there are none."""
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: a..b, or a part of more than 63 letters
        return [], getattr(error, "strerror", None) or str(error)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers)), None


def interface_of(address: str, own: Interfaces) -> str | None:
    """The interface of this host that has the address; all of 127.0.0.0/8 is the loopback's."""
    if ipaddress.ip_address(address).is_loopback:
        return "lo"
    return next((name for name, addresses in own.items() if address in addresses), None)


def missing_interfaces(chosen: str, own: Interfaces, *, prefixes: bool) -> list[str]:
    """Those names of GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME that no interface here has. Pure.

    Args:
        chosen: names with commas. prefixes: NCCL's rule: a name is a beginning, `=` in front makes it whole, `^` in
            front of the list excludes.
    """
    if prefixes and chosen.startswith("^"):
        return []
    whole = not prefixes or chosen.startswith("=")
    names = [name.split(":")[0] for name in chosen.lstrip("=").split(",") if name]
    if whole:
        return [name for name in names if name not in own]
    # One that exists is enough for NCCL.
    return [] if any(there.startswith(tuple(names)) for there in own) else names


def wait_for_port(name: str, port: int, *, deadline: float) -> str | None:
    """Waits until something accepts connections there; returns why nothing does by the deadline (time.monotonic)."""
    while True:
        try:
            left = deadline - time.monotonic()
            socket.create_connection((name, port), timeout=min(10.0, max(0.5, left))).close()
            return None
        except TimeoutError:
            reason = "no answer"
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
        if time.monotonic() > deadline:
            return reason
        time.sleep(0.2)
