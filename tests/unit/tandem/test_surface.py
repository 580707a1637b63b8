"""The SDK's surface: what is exported, how errors map, what sampling values are refused."""

from __future__ import annotations

import inspect
import math
from typing import Any

import grpc
import pytest

import tandem
from tandem import SamplingParams, _convert, errors
from tandem.connection import Connection, RetryPolicy, Tls

ERRORS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.TandemError)]


def test_everything_promised_is_there() -> None:
    for name in tandem.__all__:
        assert getattr(tandem, name).__module__.startswith("tandem.")
    assert set(tandem.__all__) <= set(dir(tandem))
    with pytest.raises(AttributeError, match="nonsense"):
        tandem.nonsense  # noqa: B018


def test_every_error_is_exported_and_comes_back_as_itself() -> None:
    for kind in ERRORS:
        assert getattr(tandem, kind.__name__) is kind
        if kind is not errors.TandemError:
            assert _convert._BY_CODE[kind.code] is kind


def test_errors_without_our_code_are_the_nearest_by_status() -> None:
    for status, kind in _convert._BY_STATUS.items():
        assert kind.grpc_status == status or kind is errors.InvalidRequestError


def test_delays_grow_and_are_bounded() -> None:
    policy = RetryPolicy(first_delay_s=0.1, max_delay_s=1.0)
    for retries, ceiling in enumerate((0.1, 0.2, 0.4, 0.8, 1.0, 1.0)):
        delays = [policy.delay_s(retries) for _ in range(50)]
        assert ceiling / 2 <= min(delays) <= max(delays) <= ceiling
        assert len(set(delays)) > 1, "without jitter all clients come back at once"


def test_tls_files_are_named_when_missing() -> None:
    with pytest.raises(errors.InvalidRequestError, match=r"/no/ca\.pem"):
        Connection("h:1", tls=Tls(ca="/no/ca.pem")).credentials()
    with pytest.raises(errors.InvalidRequestError, match="both cert and key"):
        Connection("h:1", tls=Tls(cert="c.pem")).credentials()
    assert Connection("h:1").credentials() is None
    assert Connection("h:1", tls=True).credentials() is not None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"frequency_penalty": -3.0}, "frequency_penalty"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"n": 0}, "n must"),
        ({"n": 129}, "n must"),
        ({"logprobs": 21}, "logprobs"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x" * 1025,)}, "stop"),
        ({"stop": ("x",) * 17}, "stop"),
    ],
)
def test_values_that_contradict_themselves(values: dict[str, Any], says: str) -> None:
    (problem,) = SamplingParams(**values).problems()
    assert problem.startswith(says)


def test_sensible_values_have_no_problems() -> None:
    assert SamplingParams().problems() == []
    assert SamplingParams(max_tokens=1, temperature=0.0, top_p=1.0, n=128, seed=0, logprobs=0, stop=("x",)).problems() == []


def test_a_code_of_a_newer_server_keeps_its_words() -> None:
    """Only what gRPC itself says is explained as a router that cannot be reached."""
    sent = grpc.aio.Metadata(("tandem-code", "made_up_later"))
    theirs = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), sent, "the blocks do not fit")
    assert _convert.error_from_rpc(theirs, "host:1").message == "the blocks do not fit"
    silent = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "refused")
    assert "cannot reach the router at host:1" in _convert.error_from_rpc(silent, "host:1").message
