"""Every noun that crosses the wire comes back equal."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import wire
from core.blocks import BlockRecord, Closing, KvLayout, KvSource, KvTicket
from core.cost_model import Fit, StepCost
from core.errors import InvalidRequestError
from core.kv_changes import KvChanges
from core.request import AttemptKey, AttemptTiming, FinishReason, TokenEvent, WorkerRole, WorkItem
from tandem.sampling import SamplingParams
from tandem.v1 import cluster_pb2, common_pb2, kv_pb2

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
real = st.floats(allow_nan=False, allow_infinity=False)
seconds = st.floats(0, 1e9)
name = st.text(max_size=20)
keys = st.builds(AttemptKey, name, u32)
params = st.builds(
    SamplingParams,
    max_tokens=st.none() | u32,
    temperature=real,
    top_k=u32,
    top_p=real,
    min_p=real,
    repetition_penalty=real,
    presence_penalty=real,
    frequency_penalty=real,
    logit_bias=st.dictionaries(u32, real, max_size=4),
    seed=st.none() | u64,
    n=st.integers(1, 128),
    logprobs=st.none() | st.integers(0, 20),
    stop=st.lists(name, max_size=3).map(tuple),
    stop_token_ids=st.lists(u32, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
)
resolved = st.builds(
    SamplingParams, max_tokens=st.integers(1, 99), seed=u64, temperature=real, logit_bias=st.dictionaries(u32, real, max_size=2)
)


@st.composite
def items(draw: st.DrawFn) -> WorkItem:
    tokens = tuple(draw(st.lists(u32, min_size=1, max_size=9)))
    return WorkItem(
        draw(keys),
        tokens,
        draw(st.integers(1, len(tokens))),
        draw(resolved),
        draw(u32),
        (1, 2),
        draw(st.binary(max_size=4)),
        1.5,
    )


layouts = st.builds(KvLayout, st.binary(max_size=16), st.sampled_from(["float32", "bfloat16"]), u32, u32, u32, u32)
sources = st.builds(KvSource, name, u64, name, name, name, u32, st.lists(name, max_size=3).map(tuple), name)
tickets = st.builds(KvTicket, keys, layouts, sources, seconds, name)
records = st.builds(BlockRecord, u32, st.sampled_from([b"", bytes(range(16))]), u32, u64, u64, u32)
closings = st.builds(Closing, u32, st.lists(u32, max_size=3).map(tuple), st.booleans(), seconds)
timings = st.builds(AttemptTiming, seconds, seconds, seconds, seconds, seconds, u64, name)
single = st.floats(width=32, allow_nan=False, allow_infinity=False)
tokens = st.builds(
    TokenEvent,
    keys,
    u32,
    u32,
    st.none() | single,
    st.lists(st.tuples(u32, single), max_size=3).map(tuple),
    st.none() | st.sampled_from(FinishReason),
)

NOUNS = {
    "key": keys,
    "sampling": params,
    "item": items(),
    "layout": layouts,
    "source": sources,
    "ticket": tickets,
    "record": records,
    "closing": closings,
    "timing": timings,
    "token": tokens,
}


@pytest.mark.parametrize("noun", NOUNS)
def test_there_and_back(noun):
    to_pb, from_pb = getattr(wire, f"{noun}_to_pb"), getattr(wire, f"{noun}_from_pb")

    @given(NOUNS[noun])
    def round_trip(value):
        message = to_pb(value)
        assert from_pb(type(message).FromString(message.SerializeToString())) == value

    round_trip()


def test_enums():
    assert {wire.role_from_pb(wire.role_to_pb(role)) for role in WorkerRole} == set(WorkerRole)
    assert wire.finish_from_pb(wire.finish_to_pb(None)) is None
    with pytest.raises(InvalidRequestError, match="role 99"):
        wire.role_from_pb(99)


def test_an_unset_sampling_field_means_its_default_and_zero_means_zero():
    assert wire.sampling_from_pb(common_pb2.SamplingParams()) == SamplingParams()
    greedy = wire.sampling_from_pb(common_pb2.SamplingParams(temperature=0.0))
    assert greedy.temperature == 0.0
    assert math.isclose(greedy.top_p, 1.0)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (common_pb2.WorkItem(token_ids=[1], prompt_len=2), "prompt_len 2"),
        (common_pb2.WorkItem(token_ids=[1]), "prompt_len 0"),
        (common_pb2.WorkItem(token_ids=[1], prompt_len=1), "seed and max_tokens"),
    ],
)
def test_a_work_item_that_cannot_be_one_is_refused(message, says):
    with pytest.raises(InvalidRequestError, match=says):
        wire.item_from_pb(message)


def test_a_key_of_another_length_is_refused():
    with pytest.raises(InvalidRequestError, match="16 bytes"):
        wire.record_from_pb(kv_pb2.BlockRecord(key=b"short"))


costs = st.builds(StepCost, *[st.floats(1e-9, 1e3)] * 5)


@given(st.builds(Fit, costs, u32, seconds, seconds))
def test_fits_come_back_equal(fit):
    assert wire.fit_from_pb(wire.fit_to_pb(fit)) == fit


packed = st.lists(st.binary(min_size=16, max_size=16), max_size=3).map(b"".join)


@given(st.builds(KvChanges, u32, st.integers(1, 2**64 - 1), packed, packed, packed, packed))
def test_changes_of_blocks(changes: KvChanges):
    assert wire.changes_from_pb(wire.changes_to_pb(changes)) == changes


def test_a_broken_portion_is_refused():
    with pytest.raises(InvalidRequestError, match="same version"):
        wire.changes_from_pb(common_pb2.KvChanges(sequence=1, added_dram=b"short"))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_steps_that_cannot_cost_that_are_refused(bad):
    message = wire.fit_to_pb(Fit(StepCost(1, 1, 1, 1, 1), 5, 0.0, 0.0))
    message.decode_row_s = bad
    with pytest.raises(InvalidRequestError, match="a step cannot cost"):
        wire.fit_from_pb(message)


def test_a_step_that_costs_nothing_is_refused():
    with pytest.raises(InvalidRequestError, match="all zero"):
        wire.fit_from_pb(cluster_pb2.StepCost())
