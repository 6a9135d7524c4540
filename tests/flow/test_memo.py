"""What solvers share is computed once, and its time is told to each."""

import time

import pytest
import torch

from blip3o_lit.flow.memo import Memo


@pytest.fixture
def memo() -> Memo:
    memo = Memo(torch.device("cpu"))
    memo.at("condition")
    return memo


def test_a_result_is_computed_once_per_condition(memo: Memo):
    calls = []
    for _ in range(2):
        assert memo.once("key", lambda: calls.append("first") or 7) == 7
    memo.at("condition")
    memo.once("key", lambda: calls.append("first"))
    assert calls == ["first"]
    memo.at("another")
    memo.once("key", lambda: calls.append("second"))
    assert calls == ["first", "second"]


def test_the_time_of_what_is_found_is_told(memo: Memo):
    """Of a result that holds another, too, whichever of both was there first."""

    def part() -> None:
        memo.once("part", lambda: time.sleep(0.02))

    def whole() -> None:
        part()
        time.sleep(0.01)

    def alone(compute) -> float:
        start, saved = memo.now(), memo.saved
        compute()
        return memo.now() - start + memo.saved - saved

    assert memo.saved == 0
    assert alone(part) >= 0.02
    assert memo.saved == 0
    assert alone(part) >= 0.02
    assert memo.saved >= 0.02
    assert alone(lambda: memo.once("whole", whole)) >= 0.03
    assert alone(lambda: memo.once("whole", whole)) >= 0.03
