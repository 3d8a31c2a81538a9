"""The totals that the directory keeps, beside a count of all its machines after each step."""

import ipaddress
from collections import Counter
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from siderolink.server.clock import Clock
from siderolink.server.fleet.directory import Directory, LinkState, MachineLink
from siderolink.server.store import Claim, Machine, MachineAdmission, MemoryStore
from tests.support.provision import new_key

KEY = new_key()
OVERLAY = int(ipaddress.ip_address("fdae:41e4:649b:9303::"))


class Totals(RuleBasedStateMachine):
    """Machines and claims come, change and go."""

    links: Bundle[MachineLink] = Bundle("links")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Directory(MemoryStore(), Clock())
        self.present: list[MachineLink] = []
        self.added = 0

    @rule(
        target=links,
        state=st.sampled_from(LinkState),
        admission=st.sampled_from(MachineAdmission),
        tunnel=st.booleans(),
        token=st.sampled_from((None, "a", "b")),
    )
    def add(self, state: LinkState, admission: MachineAdmission, tunnel: bool, token: str | None) -> MachineLink:
        self.added += 1
        machine = Machine(
            id=f"m{self.added}",
            node_uuid=f"{self.added:032x}",
            public_key=None,
            overlay_address=ipaddress.IPv6Address(OVERLAY + self.added),
            admission=admission,
            tunnel=tunnel,
            token_id=token,
            created_at=0.0,
            joined_at=0.0,
        )
        link = MachineLink(machine, state)
        self.directory.add(link)
        self.present.append(link)
        return link

    @rule(target=links, link=links)
    def claim(self, link: MachineLink) -> MachineLink:
        """A claim does not count as a machine, although it has a machine's row."""
        self.added += 1
        claim = Claim(
            id=f"c{self.added}",
            machine_id=link.machine.id,
            public_key=KEY,
            virtual_address=None,
            created_at=0.0,
            expires_at=60.0,
        )
        claimed = MachineLink(link.machine, LinkState.PENDING, claim)
        self.directory.add(claimed)
        self.present.append(claimed)
        return claimed

    @rule(link=links, state=st.sampled_from(LinkState))
    def set_state(self, link: MachineLink, state: LinkState) -> None:
        self.directory.set_state(link, state)

    @rule(link=links, admission=st.sampled_from(MachineAdmission), tunnel=st.booleans())
    def change_row(self, link: MachineLink, admission: MachineAdmission, tunnel: bool) -> None:
        if link.claim is None:
            self.directory.set_row(link, replace(link.machine, admission=admission, tunnel=tunnel))

    @rule(link=consumes(links), state=st.sampled_from(LinkState))
    def remove(self, link: MachineLink, state: LinkState) -> None:
        self.directory.remove(link)
        self.present.remove(link)
        self.directory.set_state(link, LinkState.DOWN)  # callers that found it earlier still hold it

    @invariant()
    def totals_are_those_of_a_count(self) -> None:
        machines = [link for link in self.present if link.claim is None]
        assert self.directory.groups == Counter(link.group for link in machines)
        assert set(self.directory) == set(machines)
        assert self.directory.token_users == Counter(token for link in machines if (token := link.machine.join_token_id))
        assert self.directory.pending == sum(link.state is LinkState.PENDING for link in self.present)


TestTotals = Totals.TestCase
TestTotals.settings = settings(max_examples=40, stateful_step_count=30)
