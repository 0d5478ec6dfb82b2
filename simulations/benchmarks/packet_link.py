"""A bad link between two network namespaces: IP packets pass at a limited rate, late, and some are lost.

What `tc netem` does in a kernel that has it; this needs a Linux kernel with TUN devices and user namespaces, util-linux and iproute2, and
no rights. TCP on both ends is the kernel's, so that loss, retransmission and full queues are real.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

NEAR, FAR = "10.77.0.1", "10.77.0.2"
_NEWUSER, _NEWNET = 0x10000000, 0x40000000
_TUNSETIFF, _TUN, _NO_PREFIX = 0x400454CA, 0x0001, 0x1000
_PACKET = 2048


@dataclass(frozen=True)
class Conditions:
    """What is bad about a link.

    Attributes:
        rate: bits a second, each way.
        delay: seconds that a packet travels, each way, beside what it waits and takes to be sent.
        loss: share of the packets that are lost, each by itself.
        queue: bytes that wait at most, each way; a packet beyond them is lost too.
        congestion: TCP's congestion control at both ends. Reno suffers most from loss, and every Linux lets every user have it.
        seed: of the losses.
    """

    rate: float = 64_000.0
    delay: float = 0.5
    loss: float = 0.05
    queue: int = 32_000
    congestion: str = "reno"
    seed: int = 0


@dataclass
class Traffic:
    """What went over one direction of a link: packets and bytes that arrived, with IP headers, and packets that did not."""

    packets: int = 0
    bytes: int = 0
    lost: int = 0


class Link:
    """A link that is up.

    Attributes:
        near: what to put before a command that is to run at the near end, whose address is `NEAR`.
        far: the same for the far end, `FAR`.
    """

    def __init__(self, process: subprocess.Popen[str], near_fd: int) -> None:
        self._process = process
        enter = ["nsenter", "--preserve-credentials", f"--user=/proc/{process.pid}/ns/user"]
        self.near = [*enter, f"--net=/proc/{process.pid}/fd/{near_fd}", "--"]
        self.far = [*enter, f"--net=/proc/{process.pid}/ns/net", "--"]

    def traffic(self) -> tuple[Traffic, Traffic]:
        """What went from far to near, and from near to far, so far."""
        asked, answered = self._process.stdin, self._process.stdout
        if asked is None or answered is None:
            raise OSError("the link's process has no pipes")
        asked.write("\n")
        asked.flush()
        up, down = json.loads(answered.readline())
        return Traffic(**up), Traffic(**down)


@contextmanager
def packet_link(conditions: Conditions) -> Iterator[Link]:
    """A link for as long as this lasts.

    Raises:
        OSError: if this machine can't have one, with the reason.
    """
    if missing := [tool for tool in ("nsenter", "ip") if shutil.which(tool) is None]:
        raise OSError(f"there is no command {missing[0]}")
    command = [sys.executable, "-m", __name__, json.dumps(asdict(conditions))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            said = process.stdout.readline() if process.stdout else ""
            told = json.loads(said or '{"error": "it did not start"}')
            if "error" in told:
                raise OSError(told["error"])
            yield Link(process, told["near"])
        finally:
            process.kill()


def _namespace(flags: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no namespaces here: {os.strerror(number)}")


def _device(address: str, congestion: str) -> int:
    """A TUN device in the namespace of now; packets that are routed to it are read from the descriptor."""
    with open("/proc/sys/net/ipv4/tcp_congestion_control", "w", encoding="ascii") as file:
        file.write(congestion)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"tun0", _TUN | _NO_PREFIX))
    for command in (f"addr add {address}/24 dev tun0", "link set tun0 up", "link set lo up"):
        subprocess.run(["ip", *command.split()], check=True)
    return descriptor


def _up(congestion: str) -> tuple[int, int, int]:
    """Make both ends; the near namespace's descriptor, and both devices'."""
    user, group = os.getuid(), os.getgid()
    _namespace(_NEWUSER | _NEWNET)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    near = _device(NEAR, congestion)
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
    _namespace(_NEWNET)
    return namespace, near, _device(FAR, congestion)


def _relay(near: int, far: int, link: Conditions) -> None:
    """Move packets until standard input ends; each line of it asks for the traffic."""
    chance = random.Random(link.seed)  # noqa: S311
    other = {near: far, far: near}
    traffic = {far: Traffic(), near: Traffic()}  # by where packets come from
    free = {near: 0.0, far: 0.0}
    travelling: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        wait = max(0.0, travelling[0][0] - time.monotonic()) if travelling else None
        readable, _, _ = select.select([near, far, 0], [], [], wait)
        now = time.monotonic()
        for descriptor in readable:
            if descriptor == 0:
                if not os.read(0, 64):
                    return
                print(json.dumps([asdict(traffic[far]), asdict(traffic[near])]), flush=True)
                continue
            packet = os.read(descriptor, _PACKET)
            start = max(free[descriptor], now)
            if chance.random() < link.loss or (start - now) * link.rate / 8 + len(packet) > link.queue:
                traffic[descriptor].lost += 1
                continue
            free[descriptor] = start + len(packet) * 8 / link.rate
            number += 1
            heapq.heappush(travelling, (free[descriptor] + link.delay, number, descriptor, packet))
        while travelling and travelling[0][0] <= now:
            _, _, descriptor, packet = heapq.heappop(travelling)
            traffic[descriptor].packets += 1
            traffic[descriptor].bytes += len(packet)
            os.write(other[descriptor], packet)


if __name__ == "__main__":
    link = Conditions(**json.loads(sys.argv[1]))
    try:
        namespace, near_device, far_device = _up(link.congestion)
    except (OSError, subprocess.CalledProcessError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
    else:
        os.set_inheritable(namespace, True)
        print(json.dumps({"near": namespace}), flush=True)
        _relay(near_device, far_device, link)
