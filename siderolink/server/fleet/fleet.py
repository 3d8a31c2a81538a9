"""Assembles the fleet of one server."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Network
from typing import TYPE_CHECKING

from siderolink.common.wireguard.device import Device
from siderolink.server.admission.admit import Admission
from siderolink.server.admission.limits import MachineLimits
from siderolink.server.admission.policy import JoinPolicy
from siderolink.server.admission.prove import Proofs
from siderolink.server.admission.rows import Rows
from siderolink.server.admission.token_rules import TokenRules
from siderolink.server.clock import Clock
from siderolink.server.events import EventHub
from siderolink.server.fleet.dialling import redial
from siderolink.server.fleet.directory import Directory
from siderolink.server.fleet.enrolment import Enrolment
from siderolink.server.fleet.failover import Failover, Lease
from siderolink.server.fleet.last_seen import LastSeenNotes
from siderolink.server.fleet.limit_watch import LimitWatch
from siderolink.server.fleet.liveness import Liveness
from siderolink.server.fleet.machines import Machines
from siderolink.server.fleet.membership import Membership
from siderolink.server.fleet.monitor import Monitor
from siderolink.server.fleet.moves import Moves
from siderolink.server.fleet.owners import Owners
from siderolink.server.fleet.reconciler import Reconciler
from siderolink.server.fleet.row_transitions import RowTransitions
from siderolink.server.fleet.sessions import Sessions
from siderolink.server.store import Store

if TYPE_CHECKING:
    from siderolink.common.wireguard.noise.tai64n import CommonTimestamps


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The parts; each depends only on those before it."""

    directory: Directory
    sessions: Sessions
    liveness: Liveness
    admission: Admission
    reconciler: Reconciler
    monitor: Monitor
    moves: Moves
    machines: Machines
    enrolment: Enrolment
    limits: LimitWatch
    last_seen: LastSeenNotes
    membership: Membership | None
    """This server's membership in its store; None for a store that other servers cannot use."""
    owners: Owners | None
    failover: Failover | None
    lease: Lease | None


def make_fleet(
    device: Device,
    store: Store,
    events: EventHub,
    prefix: IPv6Network,
    *,
    limits: MachineLimits | None = None,
    policy: JoinPolicy | None = None,
    clock: Clock | None = None,
    persistent_keepalive: int = 25,
    last_seen: LastSeenNotes | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
    membership: Membership | None = None,
    stamps: "CommonTimestamps | None" = None,
) -> Fleet:
    """Create the parts without starting them."""
    limits, clock, last_seen = limits or MachineLimits(), clock or Clock(), last_seen or LastSeenNotes(store)
    directory = Directory(store, clock)
    sessions = Sessions(device, directory, max_unproven_streams=limits.max_unproven_streams, clock=clock)
    by_engine = device.kind == "userspace"
    owners = None if membership is None else Owners(membership, directory, store, clock, stamps, paths_are_proven=by_engine)
    last_seen.owners = owners
    liveness = Liveness(device, directory, clock, owners=owners)
    rows = Rows(prefix, limits, clock, entropy, count_machines=directory.__len__)
    admission = Admission(liveness, rows, clock, TokenRules(store.sealer, clock), policy, directory.denied.find)
    reconciler = Reconciler(
        device, directory, sessions, store, events, clock, limits, persistent_keepalive=persistent_keepalive, owners=owners
    )
    failover = lease = None
    if owners is not None:
        owners.apply = reconciler.set_sending
        failover = Failover(owners, directory, sessions, reconciler, store, clock)
        lease = Lease(owners, directory, device, clock, limits.max_offline)
    proofs = Proofs(liveness, clock, admission.policy)
    transitions = RowTransitions(directory, liveness, reconciler, proofs, store, events)
    monitor = Monitor(
        directory, sessions, liveness, reconciler, admission, transitions, events, limits, clock, last_seen, owners
    )
    moves = Moves(store, directory, liveness, reconciler, proofs, events, clock)
    moves.on_moved = monitor.moved
    liveness.redial = partial(redial, reconciler)
    machines = Machines(store, directory, liveness, reconciler, admission, moves, events, clock)
    return Fleet(
        directory=directory,
        sessions=sessions,
        liveness=liveness,
        admission=admission,
        reconciler=reconciler,
        monitor=monitor,
        moves=moves,
        machines=machines,
        enrolment=Enrolment(store, directory, sessions, reconciler, admission.policy),
        limits=LimitWatch(device, directory, events, clock),
        last_seen=last_seen,
        membership=membership,
        owners=owners,
        failover=failover,
        lease=lease,
    )
