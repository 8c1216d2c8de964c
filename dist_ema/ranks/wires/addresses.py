"""Where another process can reach this one: its addresses, best first. No communication but name look-ups."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dist_ema.ranks.store.processes import namespace_identity

__all__ = ["INTERFACE_VARIABLE", "Address", "addresses_of_host", "host_identity", "open_listener"]

# The variable of gloo that names the network interface to use.
INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915
_LISTEN_BACKLOG = 4096


class Address(NamedTuple):
    """Where a rank can be reached, and what the two sides say to show who they are.

    Attributes:
        host: the identity of its host.
        names: the addresses of its host, the likeliest first.
        port: the port.
        token: what the rank that connects says.
        answer: what the rank that was reached says then.
    """

    host: str
    names: list[str]
    port: int
    token: bytes
    answer: bytes

    @property
    def hosts(self) -> list[str]:
        """The addresses to try in turn, from here."""
        return [*(["127.0.0.1"] if self.host == host_identity() else []), *self.names]

    def to_text(self) -> str:
        """A text for other ranks."""
        return json.dumps([self.host, self.names, self.port, self.token.hex(), self.answer.hex()])

    @staticmethod
    def of(text: str) -> Address:
        """The address that a text has."""
        host, names, port, token, answer = json.loads(text)
        return Address(host, names, port, bytes.fromhex(token), bytes.fromhex(answer))


def open_listener() -> socket.socket:
    """A socket that listens on all interfaces, at a port that the system chooses; for IPv4, and IPv6 if there is."""
    with suppress(OSError):  # a kernel that knows IPv6 may still have it switched off
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_LISTEN_BACKLOG, reuse_port=False
            )
    return socket.create_server(("", 0), backlog=_LISTEN_BACKLOG)


@functools.cache
def host_identity() -> str:
    """A text that processes have alike if they reach each other at the loopback address."""
    # Where the system does not tell, nobody else has this text: the loopback address is not used.
    return namespace_identity("net") or f"{socket.gethostname()}/{os.getpid()}"


def addresses_of_host() -> list[str]:
    """The addresses at which processes on other hosts may reach this one, the likeliest first."""
    return list(
        _addresses(
            os.environ.get(INTERFACE_VARIABLE, ""),
            os.environ.get("NCCL_SOCKET_IFNAME", ""),
            os.environ.get("MASTER_ADDR", ""),
        )
    )


@functools.cache  # a look-up of names may take seconds
def _addresses(gloo_names: str, nccl_names: str, master: str) -> tuple[str, ...]:
    addresses: list[str] = []
    for name in _interfaces(gloo_names, nccl_names):
        addresses += _of_interface(name)
    if master:
        addresses += _towards(master)
    with suppress(OSError):
        addresses += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)]
    return tuple(dict.fromkeys(address for address in addresses if not _is_local(address)))


def _is_local(address: str) -> bool:
    """Whether an address has no meaning on other hosts."""
    return address.startswith(("127.", "fe80:", "0.")) or address in ("::1", "::")


def _interfaces(gloo_names: str, nccl_names: str) -> list[str]:
    """The interfaces that the environment names. NCCL takes beginnings of names, and exact ones after "="."""
    if gloo_names:
        return gloo_names.split(",")
    if not nccl_names or nccl_names.startswith("^"):  # "^" names those that must not be used
        return []
    if nccl_names.startswith("="):
        return nccl_names[1:].split(",")
    beginnings = tuple(nccl_names.split(","))
    return [name for _, name in socket.if_nameindex() if name.startswith(beginnings)]


def _of_interface(name: str) -> list[str]:
    addresses: list[str] = []
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", name.encode()[:15])
        addresses.append(socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]))
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            number, *_, interface = line.split()
            if interface == name:
                addresses.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(number)))
    return addresses


def _towards(master: str) -> list[str]:
    """The address of this host on the way to another one. Connecting a datagram socket sends nothing."""
    addresses: list[str] = []
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                addresses.append(str(probe.getsockname()[0]))
    return addresses
