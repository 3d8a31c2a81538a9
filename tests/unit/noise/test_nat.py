"""Many machines behind one address, during a flood from many others."""

from dataclasses import dataclass

from siderolink.common.wireguard.noise import Drop
from tests.support.virtual import Clock, Node, VirtualPath, dropped, inner_packet

MACHINES = 1_000
TICK = 0.02
FLOOD = 60
"""Initiations of strangers in each tick: three thousand a second."""


@dataclass(frozen=True, slots=True)
class AddressPath(VirtualPath):
    """A path that also has an address and a port."""

    place: bytes = b""

    @property
    def source(self) -> bytes:
        return self.place


class Scene:
    """A server, the machines, and a stranger whose well-made initiation comes from everywhere."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.server = Node("server", "fd00::1", self.clock, 1)
        self.machines = {
            f"machine {number}": Node(f"machine {number}", f"fd00::{number + 2:x}", self.clock, number + 10)
            for number in range(MACHINES)
        }
        self.paths = {
            name: AddressPath(name, place=b"\xc0\0\2\1" + port.to_bytes(2, "big"))
            for port, name in enumerate(self.machines, start=1)
        }
        for machine in self.machines.values():
            machine.add(self.server)
            self.server.add(machine, dial=False)
        stranger = Node("stranger", "fd00::ffff", self.clock, 5)
        stranger.add(self.server)
        stranger.send(inner_packet("fd00::ffff", "fd00::1", b"?"))
        (self.well_made,) = stranger.take()
        self.strangers = 0

    def flood(self) -> None:
        for _ in range(FLOOD):
            self.strangers += 1
            self.server.receive(self.well_made, AddressPath("elsewhere", place=self.strangers.to_bytes(4, "big") + b"\0\1"))
        if self.server.engine.next_deadline() <= self.clock.now:
            self.server.handle_timers()

    def exchange(self) -> None:
        for name, machine in self.machines.items():
            if machine.engine.next_deadline() <= self.clock.now:
                machine.handle_timers()
            for datagram in machine.take():
                self.server.receive(datagram, self.paths[name])
        answers = list(self.server.sent)
        self.server.sent.clear()
        for name, datagram in answers:
            if name in self.machines:
                self.machines[name].receive(datagram, self.server.path)

    def back(self) -> int:
        return len({packet[40:] for packet in self.server.received})


def test_a_thousand_machines_behind_one_nat_come_back_within_seconds() -> None:
    scene = Scene()
    while scene.clock.now < 1.0:  # the flood is there first
        scene.flood()
        scene.clock.now += TICK
    for name, machine in scene.machines.items():
        machine.send(inner_packet(machine.address, "fd00::1", name.encode()))
    began = scene.clock.now
    while scene.back() < MACHINES:
        assert scene.clock.now - began < 6.0
        scene.exchange()
        scene.flood()
        scene.clock.now += TICK
    # a cookie was required of all, and no stranger got any further
    assert dropped(scene.server)[Drop.BAD_MAC2] > MACHINES
    assert dropped(scene.server)[Drop.UNKNOWN_PEER] <= 500 * 2
