"""Shares of work come back in order, whichever thread took them."""

import threading
import time

import pytest

from gradprune.core.threads import behind, in_shares, mapped


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


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_what_is_mapped_comes_in_order_and_only_a_few_items_are_asked_for_ahead(threads):
    asked = []

    def items():
        for i in range(50):
            asked.append(i)
            yield i

    found = mapped(lambda i: (time.sleep(0.001 * (i % 3)), i)[1], items(), threads)
    assert [next(found) for _ in range(10)] == list(range(10))
    assert len(asked) <= 10 + threads
    assert list(found) == list(range(10, 50))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_an_error_while_mapping_is_raised_where_its_item_comes(threads):
    found = mapped(lambda i: 1 // (3 - i), iter(range(6)), threads)
    assert [next(found) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_behind_are_done_in_order_before_the_block_ends(threads):
    done = []
    with behind(threads) as later:
        for i in range(20):
            later(done.append, i)
            assert i - len(done) < 4
    assert done == list(range(20))


def test_an_error_behind_is_raised_and_nothing_goes_on_silently():
    with pytest.raises(ZeroDivisionError), behind(2) as later:
        later(divmod, 1, 0)


def test_an_error_behind_is_raised_by_one_of_the_next_calls():
    with behind(2) as later:
        later(divmod, 1, 0)
        later(time.sleep, 0)
        with pytest.raises(ZeroDivisionError):
            later(time.sleep, 0)
