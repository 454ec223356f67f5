# SPDX-License-Identifier: Apache-2.0
"""The enumeration of what a power cut may leave: exactly the expected states, in cases that can be counted by hand."""

from __future__ import annotations

import random

import pytest

from bottomhalf.host.protocol import IN
from bottomhalf.host.request import FLUSH, FUA, IN_PROGRESS, WRITE, WRITE_ZEROES, Request
from bottomhalf.host.sim import Odds, SimHost
from bottomhalf.host.sim.disk import SECTOR, Change, Inode
from bottomhalf.host.sim.engine import SimEngine
from bottomhalf.host.sim.survivors import BOUNDARIES_MAX, REORDER_MAX, survivors, tears

A, B, C, D = (bytes([letter]) * SECTOR for letter in b"abcd")
OLD = b"." * SECTOR


def disk(sectors: int) -> tuple[SimHost, Inode]:
    host = SimHost(0)
    host.add_file("f", OLD * sectors)
    return host, host.disk.files["f"]


def found(host: SimHost, reorder: int) -> list[bytes]:
    """Each sector as one letter, in order."""
    contents = [state.files["f"][::SECTOR] for state in host.survivors("f", reorder=reorder)]
    assert len(contents) == len(set(contents)), "a state came twice"
    return sorted(contents)


def write(inode: Inode, *sectors: bytes, at: int = 0, durable: bool = False) -> None:
    assert inode.write(at * SECTOR, b"".join(sectors), durable) == 0


def test_nothing_in_doubt() -> None:
    host, _ = disk(2)
    assert found(host, 3) == [b".."]
    (state,) = host.survivors("f")
    assert str(state) == "everything is durable"


def test_prefixes_alone() -> None:
    """What keeps its order leaves its prefixes."""
    host, inode = disk(3)
    for at, letter in enumerate((A, B, C)):
        write(inode, letter, at=at)
    assert found(host, 1) == sorted([b"...", b"a..", b"ab.", b"abc"])


def test_every_subset_within_the_bound() -> None:
    host, inode = disk(4)
    for at, letter in enumerate((A, B, C, D)):
        write(inode, letter, at=at)
    prefixes = [b"....", b"a...", b"ab..", b"abc.", b"abcd"]
    swapped = [b".b..", b"a.c.", b"ab.d"]  # the next one overtakes the first that is missing
    assert found(host, 2) == sorted(prefixes + swapped)
    further = [b"..c.", b".bc.", b"a..d", b"a.cd"]
    assert found(host, 3) == sorted(prefixes + swapped + further)
    assert len(found(host, 4)) == 16 == len(found(host, 5)), "with the whole log in the window: all subsets"


def test_an_overwritten_sector_has_any_of_its_contents() -> None:
    host, inode = disk(1)
    for letter in (A, B):
        write(inode, letter)
    assert found(host, 1) == [b".", b"a", b"b"]
    write(inode, A)
    assert found(host, 1) == [b".", b"a", b"b"], "equal contents are one state"


def test_torn_at_each_boundary() -> None:
    host, inode = disk(3)
    write(inode, A, B, C)
    heads, tails = [b"a..", b"ab."], [b".bc", b"..c"]
    assert found(host, 1) == sorted([b"...", b"abc", *heads, *tails])


def test_torn_behind_a_prefix_and_torn_where_it_was_reordered() -> None:
    host, inode = disk(4)
    write(inode, A, B)
    write(inode, C, D, at=2)
    whole = [b"....", b"ab..", b"abcd", b"..cd"]
    last_torn = [b"a...", b".b..", b"abc.", b"ab.d", b"..c.", b"...d"]
    first_torn = [b"a.cd", b".bcd"]  # the later one whole
    assert found(host, 2) == sorted(whole + last_torn + first_torn)


def test_boundaries_are_those_of_sectors_of_the_disk() -> None:
    """A write that begins inside a sector is torn where that ends."""
    assert list(tears(Change(0, 500, 100))) == [(500, 512), (512, 600)]
    assert list(tears(Change(0, 512, 512))) == []
    assert list(tears(Change(0, 513, 10))) == []
    assert list(tears(Change(2, 5000, 0))) == [], "a change of size"


def test_long_ones_are_torn_at_some_boundaries() -> None:
    parts = list(tears(Change(0, 0, 1000 * SECTOR)))
    assert len(parts) == 2 * BOUNDARIES_MAX
    boundaries = sorted({end for start, end in parts if start == 0})
    assert boundaries[0] == SECTOR and boundaries[-1] == 999 * SECTOR
    assert all(boundary % SECTOR == 0 for boundary in boundaries) and len(set(boundaries)) == BOUNDARIES_MAX
    few = (BOUNDARIES_MAX + 1) * SECTOR
    assert len(list(tears(Change(0, 0, few)))) == 2 * BOUNDARIES_MAX


def test_zeroes_and_sizes() -> None:
    host, inode = disk(4)
    inode.zero(0, 2 * SECTOR, unmap=True, grow=False, durable=False)
    inode.resize(3 * SECTOR)
    states = {state.files["f"][::SECTOR] for state in host.survivors("f", reorder=2)}
    zeroed = [b"....", b"\0...", b".\0..", b"\0\0.."]
    assert states == {*zeroed, *(each[:3] for each in zeroed)}


def test_what_is_durable_is_always_there() -> None:
    """A write with FUA stays, although what was before it may be missing."""
    host, inode = disk(3)
    write(inode, A)
    write(inode, B, at=1, durable=True)
    write(inode, C, at=2)
    assert found(host, 3) == sorted([b".b.", b"ab.", b".bc", b"abc"])
    inode.make_durable(inode.mark())
    assert found(host, 3) == [b"abc"]


def test_an_older_write_does_not_come_back_over_a_durable_one() -> None:
    host, inode = disk(1)
    write(inode, A)
    write(inode, B, durable=True)
    assert found(host, 3) == [b"b"]


def test_a_failed_flush_leaves_doubts() -> None:
    host, inode = disk(2)
    write(inode, A)
    write(inode, B, at=1)
    inode.doom(inode.mark())
    assert len(found(host, 2)) == 4


def test_files_together_in_their_common_order() -> None:
    host = SimHost(0)
    for path in "xy":
        host.add_file(path, OLD)
    write(host.disk.files["y"], A)
    write(host.disk.files["x"], B)

    def pairs(*paths: str) -> set[bytes]:
        return {b"".join(state.files[path][:1] for path in paths) for state in host.survivors(*paths, reorder=1)}

    assert pairs("x", "y") == {b"..", b".a", b"ba"}
    assert pairs("y", "x") == {b"..", b"a.", b"ab"}
    assert pairs("x") == {b".", b"b"}


def test_the_moments_before_something_becomes_durable() -> None:
    host, inode = disk(2)
    seen: list[list[bytes]] = []
    host.before_durable = lambda: seen.append(found(host, 1))
    inode.make_durable(inode.mark())
    assert seen == [], "nothing was in doubt"
    write(inode, A)
    assert seen == []
    inode.make_durable(inode.mark())
    assert seen == [[b"..", b"a."]]
    write(inode, B, at=1, durable=True)
    assert seen[1:] == [[b"a.", b"ab"]], "while it is under way it is in doubt like any other"
    host.before_durable = None
    write(inode, C)
    inode.make_durable(inode.mark())
    assert len(seen) == 2


def test_writes_that_are_under_way() -> None:
    """They may be there, and nobody was told."""
    host = SimHost(1, odds=Odds.calm())
    host.add_file("f", OLD * 2, cached="never")
    file, engine = host.open_file("f"), host.engine()
    host.fault(path="f", op=WRITE, hold=True)
    engine.prepare(file, Request(WRITE, 0, SECTOR, memoryview(A)))
    engine.enter()
    assert found(host, 1) == [b"..", b"a."]


@pytest.mark.parametrize("reorder", [0, -1, REORDER_MAX + 1])
def test_bounds_that_are_none(reorder: int) -> None:
    host, _ = disk(1)
    with pytest.raises(ValueError, match="not 1 to"):
        list(host.survivors("f", reorder=reorder))


def test_messages() -> None:
    host, inode = disk(3)
    write(inode, A, B)
    inode.zero(SECTOR, SECTOR, unmap=True, grow=False, durable=False)
    inode.resize(512)
    told = {str(state) for state in host.survivors("f", reorder=1)}
    assert (
        "f: write 0x0 to 0x400: only 0x0 to 0x200\nf: zero, unmap 0x200 to 0x400: lost\nf: 0x200 bytes large: lost"
        in told
    )


def test_the_random_ones_are_among_all(seed: int) -> None:
    """``survivor`` picks one; with a bound as long as the log it is among those that are enumerated."""
    host = SimHost(seed)
    host.add_file("f", OLD * 8)
    inode, chance = host.disk.files["f"], random.Random(seed)
    for _ in range(6):
        write(inode, bytes([chance.randrange(256)]) * SECTOR, at=chance.randrange(8))
    states = {state.files["f"] for state in survivors([inode], reorder=6)}
    for _ in range(20):
        assert host.survivor("f") in states


def run(host: SimHost, engine: SimEngine, path: str, requests: list[Request]) -> None:
    """One after the other."""
    file = host.open_file(path)
    poller = host.poller()
    poller.register(engine.fileno(), IN)
    for request in requests:
        engine.prepare(file, request)
        engine.enter()
        while request.result == IN_PROGRESS:
            if not engine.reap():
                poller.wait(-1)
    poller.close()
    file.close()


def test_through_the_engine(seed: int) -> None:
    """The states at the moments before a flush are all that there are: each survivor at any moment is among them."""
    host = SimHost(seed)
    host.add_file("f", OLD * 4)
    states: set[bytes] = set()
    host.before_durable = lambda: states.update(s.files["f"] for s in host.survivors("f", reorder=4))
    engine = host.engine()
    requests = [
        Request(WRITE, 0, SECTOR, memoryview(A)),
        Request(WRITE, SECTOR, SECTOR, memoryview(B)),
        Request(FLUSH, 0, 0, None),
        Request(WRITE_ZEROES, 0, SECTOR, None),
        Request(WRITE, 2 * SECTOR, SECTOR, memoryview(C), FUA),
        Request(FLUSH, 0, 0, None),
    ]
    sampled = []
    for request in requests:
        run(host, engine, "f", [request])
        sampled += [host.survivor("f") for _ in range(5)]
    assert all(each in states | {host.durable_content("f")} for each in sampled)
    assert len(states) == 4 + 3
