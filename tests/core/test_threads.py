"""Shares of work come back in order, whichever thread took them."""

import threading
import time

import pytest

from gradprune.core.threads import in_shares


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("number", [0, 1, 3, 1000])
def test_every_piece_is_taken_once_and_in_order(threads, number):
    shares = in_shares(list, list(range(number)), threads)
    assert [piece for share in shares for piece in share] == list(range(number))


def test_one_thread_is_the_callers_own():
    assert in_shares(lambda _: threading.get_ident(), range(1000), 1) == [threading.get_ident()]


def test_a_thread_that_is_held_up_leaves_the_rest_to_the_other():
    taken, free = {}, threading.Event()

    def work(share):
        taken.setdefault(threading.get_ident(), []).append(share)
        if 0 in share:
            assert free.wait(10)
        else:
            time.sleep(0.001)
        if 999 in share:
            free.set()

    in_shares(work, range(1000), 2)
    assert sorted(map(len, taken.values()))[0] == 1


def test_an_error_of_one_share_is_raised():
    def work(share):
        if 500 in share:
            raise ValueError("five hundred")

    with pytest.raises(ValueError, match="five hundred"):
        in_shares(work, range(1000), 2)
