"""What a replica says rests on its disk: which messages may leave before the write (thesis §3.8)."""

from __future__ import annotations

from random import Random

import pytest

from shardkv.raft.protocol.core import Raft
from shardkv.raft.protocol.log import Log
from shardkv.raft.protocol.membership import Memberships
from shardkv.raft.protocol.messages import (
    AppendEntries,
    AppendReply,
    Envelope,
    InstallSnapshotReply,
    Message,
    ReadIndex,
    RequestVote,
    RequestVoteReply,
)
from shardkv.raft.protocol.outbox import Outbox
from shardkv.raft.protocol.quorum import Membership
from shardkv.raft.protocol.ready import Options, Ready, Write
from shardkv.raft.protocol.types import Entry, HardState, Kind, Term


def core(
    hard_state: HardState | None = None, entries: tuple[Entry, ...] = (), id: int = 1, voters: int = 3
) -> Raft:
    memberships = Memberships(0, Membership(frozenset(range(1, voters + 1))))
    return Raft(id, memberships, Log(0, 0, entries), hard_state or HardState(), 0, Random(id), Options())


def entry(index: int, term: Term) -> Entry:
    return Entry(index, term, Kind.COMMAND, b"x")


def append(sender: int, term: Term, prev: tuple[int, Term], *entries: Entry) -> Envelope:
    return Envelope(sender, 1, term, AppendEntries(*prev, entries, 0, 0))


def said(ready: Ready) -> list[Message]:
    return [envelope.message for envelope in ready.messages]


def promised(write: Write | None) -> list[Message]:
    assert write is not None
    return [envelope.message for envelope in write.promises]


def win_the_pre_vote(raft: Raft) -> Ready:
    """What it wants to do as soon as it may campaign; nothing of that is carried out."""
    for _ in range(100):
        raft.tick(0.0)
        ready = raft.ready(0.0)
        if ready.messages:
            break
    question = ready.messages[0]
    assert question.message == RequestVote(
        pre=True, last_log_index=raft.log.last_index, last_log_term=raft.log.last_term
    )
    raft.step(Envelope(question.to, raft.id, question.term, RequestVoteReply(pre=True, granted=True)))
    return raft.ready(0.0)


def test_a_campaign_leaves_only_with_the_write_of_its_own_term_and_vote() -> None:
    raft = core(HardState(4, 2), (entry(1, 4),))
    raft.step(append(2, 4, (1, 4), entry(2, 4)))
    write = raft.ready(0.0).write
    assert write is not None
    raft.written(write)
    ready = win_the_pre_vote(raft)
    assert said(ready) == [], "nothing of a real campaign precedes its disk"
    assert ready.write is not None and ready.write.hard_state == HardState(5, 1)
    requests = [e for e in ready.write.promises if isinstance(e.message, RequestVote)]
    assert [(e.to, e.term) for e in requests] == [(2, 5), (3, 5)]
    assert all(e.message == RequestVote(False, 2, 4) for e in requests)


def test_no_replica_leads_one_term_twice() -> None:
    """Both other votes came before the candidate's own disk, and a crash: so it once led term 1 two times."""
    before = core()
    led = 0
    ready = win_the_pre_vote(before)
    sent = list(ready.messages)  # the write is lost in the crash: its promises never leave
    after = core()
    while not after.is_leader:
        ready = win_the_pre_vote(after)
        sent += ready.messages
        assert ready.write is not None
        after.written(ready.write)
        sent += [promise for promise in ready.write.promises if promise.to != 1]
        for request in sent:
            assert isinstance(request.message, RequestVote)
            led += 1
            after.step(Envelope(request.to, 1, request.term, RequestVoteReply(False, True)))
    assert led == 2, "the votes are answers to the campaign that is on the disk"


@pytest.mark.parametrize(
    "mail",
    [
        pytest.param(append(2, 7, (0, 0)), id="a heartbeat's answer"),
        pytest.param(append(2, 7, (9, 7), entry(10, 7)), id="a rejection"),
        pytest.param(Envelope(2, 1, 7, RequestVote(False, 0, 0)), id="a refused vote"),
    ],
)
@pytest.mark.parametrize("disk_term", [4, 6])
def test_a_replica_does_not_speak_in_a_term_that_its_disk_does_not_know(mail: Envelope, disk_term: int) -> None:
    raft = core(HardState(disk_term, 0), (entry(1, 4),))
    raft.step(mail)
    ready = raft.ready(0.0)
    assert said(ready) == []
    assert ready.write is not None and ready.write.hard_state is not None
    assert ready.write.hard_state.term == 7
    assert len(ready.write.promises) == 1
    raft.step(mail)
    behind = raft.ready(0.0)
    assert said(behind) == [], "the write is on its way, and not on the disk"
    assert len(promised(behind.write)) == 1
    raft.written(ready.write)
    raft.step(mail)
    assert len(raft.ready(0.0).messages) == 1, "from the write on there is nothing to wait for"


def test_a_question_of_a_follower_waits_for_the_term_too() -> None:
    raft = core()
    raft.step(append(2, 3, (0, 0)))
    raft.read(1, 0.0)
    ready = raft.ready(0.0)
    assert said(ready) == []
    assert any(isinstance(message, ReadIndex) for message in promised(ready.write))


def test_pre_votes_wait_for_no_disk() -> None:
    raft = core(HardState(4, 0))
    raft.step(Envelope(2, 1, 9, RequestVote(True, 0, 0)))
    ready = raft.ready(0.0)
    assert said(ready) == [RequestVoteReply(True, True)] and ready.messages[0].term == 9
    assert ready.write is None


def test_a_promise_keeps_the_term_in_which_it_was_made() -> None:
    """An acknowledgement for the old leader, stamped with the new term, confirms what nobody compared."""
    raft = core(HardState(1, 0))
    raft.step(append(2, 1, (0, 0), entry(1, 1)))
    raft.step(append(3, 2, (0, 0)))
    ready = raft.ready(0.0)
    assert ready.write is not None and ready.write.hard_state == HardState(2, 0)
    first = ready.write.promises[0]
    assert (first.to, first.term, first.message) == (2, 1, AppendReply(True, 1, 0))


def test_a_repeated_vote_waits_behind_the_write_of_the_first() -> None:
    raft = core()
    ask = Envelope(2, 1, 1, RequestVote(False, 0, 0))
    raft.step(ask)
    first = raft.ready(0.0).write
    raft.step(ask)
    again = raft.ready(0.0)
    assert said(again) == [] and promised(again.write) == [RequestVoteReply(False, True)]
    assert first is not None and first.hard_state == HardState(1, 2)


def test_the_outbox_refuses_a_vote_and_a_campaign_on_the_early_ways() -> None:
    out = Outbox(1, 5)
    with pytest.raises(AssertionError, match="a vote is a promise"):
        out.send(2, 5, RequestVoteReply(pre=False, granted=True))
    with pytest.raises(AssertionError, match="rests on the disk"):
        out.ask(2, 5, RequestVote(False, 0, 0))
    assert out.drain(None, ()).messages == (), "what was refused did not leave"


def test_the_answer_to_a_chunk_waits_for_its_term_and_keeps_it() -> None:
    raft = core()
    raft.step(append(2, 3, (0, 0)))
    answer = InstallSnapshotReply(7, 0, 5, False, 1)
    raft.answer_chunk(2, 3, answer)
    ready = raft.ready(0.0)
    assert answer not in said(ready) and answer in promised(ready.write)
    assert ready.write is not None
    raft.written(ready.write)
    raft.step(append(3, 4, (0, 0)))  # a newer term, which the disk does not know
    raft.answer_chunk(2, 3, answer)
    assert Envelope(1, 2, 3, answer) in raft.ready(0.0).messages


def test_a_vote_in_a_term_that_is_durable_already_is_in_the_write_that_it_leaves_with() -> None:
    """The disk knows term 3 without a vote. A vote that only memory had could be given twice after a crash."""
    raft = core(HardState(3, 0))
    raft.step(Envelope(2, 1, 3, RequestVote(False, 0, 0, True)))
    write = raft.ready(0.0).write
    assert write is not None
    assert write.hard_state == HardState(3, 2)
    assert promised(write) == [RequestVoteReply(pre=False, granted=True)]
