"""Eight numbers at once: rows up to the last, masks, exponentials and logarithms."""

import math

import numba as nb
import numpy as np
import pytest

from spatialavatar0.ground.lanes import numbers8, pick, put8, rows8, some
from spatialavatar0.splats.kernels import kernel

LENGTHS = (0, 1, 7, 8, 9, 16, 4097)
swift = nb.njit(**{**kernel, 'cache': False})
ZERO = np.float32(0)


@swift
def copy_numbers(x, out):
    for i in range(0, len(x), 8):
        put8(out, i, numbers8(x, i))


@swift
def copy_two(x, out):
    for i in range(0, len(x), 8):
        put8(out, i, rows8(x, i, 2))


@swift
def copy_three(x, out):
    for i in range(0, len(x), 8):
        put8(out, i, rows8(x, i, 3))


@swift
def copy_four(x, out):
    for i in range(0, len(x), 8):
        put8(out, i, rows8(x, i, 4))


@swift
def exps(x, out):
    for i in range(0, len(x), 8):
        put8(out, i, math.exp(numbers8(x, i)))


@swift
def logs(x, out):
    for i in range(0, len(x), 8):
        put8(out, i, math.log(numbers8(x, i)))


@swift
def clamped(x, out):
    for i in range(0, len(x), 8):
        a, b, c = rows8(x, i, 3)
        put8(out, i, pick(a > b, (a, b, c), ZERO))


@swift
def unequal(x):
    numbers = numbers8(x, 0)
    return some(numbers != numbers), some(numbers == numbers), some(numbers != ZERO)


@swift
def picked(mask, yes, no):
    return pick(mask, yes, no)


def of(function, x):
    "What a loop makes of numbers."
    x = np.asarray(x, np.float32)
    out = np.empty_like(x)
    function(x, out)
    return out


def last_digits(found, true):
    true = np.asarray(true, np.float64)
    return np.max(abs(found - true) / np.spacing(abs(true).astype(np.float32)))


@pytest.mark.parametrize('n', LENGTHS)
@pytest.mark.parametrize(
    'copy,shape',
    ((copy_numbers, ()), (copy_two, (2,)), (copy_three, (3,)), (copy_four, (4,))),
    ids=lambda x: str(x) if isinstance(x, tuple) else '',
)
def test_no_row_is_lost_and_none_is_invented(copy, shape, n):
    "Copied out of the middle of an array into the middle of another: the neighbours stay."
    wide = np.random.default_rng(n).normal(size=(n + 16, *shape)).astype(np.float32)
    room = np.full((n + 16, *shape), 7, np.float32)
    copy(wide[3 : 3 + n], room[5 : 5 + n])
    assert np.array_equal(room[5 : 5 + n], wide[3 : 3 + n])
    assert (room[:5] == 7).all()
    assert (room[5 + n :] == 7).all()


def test_the_last_page_of_memory():
    "A mapped page that ends where the array ends: a read behind it would end the process."
    import mmap

    length = mmap.PAGESIZE
    page = np.frombuffer(mmap.mmap(-1, length), np.float32)
    for n in (1, 5, 9):
        rows = page[len(page) - 3 * n :].reshape(n, 3)
        rows[:] = np.arange(3 * n).reshape(n, 3)
        assert np.array_equal(of(copy_three, rows), rows)
        copy_three(of(copy_three, rows) + np.float32(1), rows)
        assert rows[-1, -1] == 3 * n


def test_rows_that_do_not_follow_each_other_are_refused():
    wide = np.zeros((9, 6), np.float32)
    with pytest.raises(nb.TypingError):
        copy_three(wide[:, :3], np.zeros((9, 3), np.float32))
    with pytest.raises(nb.TypingError):
        copy_three(np.zeros((9, 3)), np.zeros((9, 3), np.float32))


def test_exponentials():
    "Log scales, logits and far beyond."
    x = np.linspace(-86.9, 88.72, 500_001, dtype=np.float32)
    assert last_digits(of(exps, x), np.exp(x.astype(float))) < 1.5
    x = np.linspace(-20, 5, 500_001, dtype=np.float32)
    assert last_digits(of(exps, x), np.exp(x.astype(float))) < 1.5


def test_logarithms():
    x = np.exp(np.linspace(-87, 88.7, 500_001)).astype(np.float32)
    assert last_digits(of(logs, x), np.log(x.astype(float))) < 2.5
    near_one = np.linspace(0.5, 2, 500_001, dtype=np.float32)
    near_one = near_one[near_one != 1]
    assert last_digits(of(logs, near_one), np.log(near_one.astype(float))) < 2.5
    strengths = np.linspace(1, 255, 500_001, dtype=np.float32)[1:]
    assert last_digits(of(logs, strengths), np.log(strengths.astype(float))) < 2.5


def test_ends_of_exponential_and_logarithm():
    inf, nan = float('inf'), float('nan')
    x = [-inf, -1e30, -90, -0.0, 0, 89, 1e30, inf, nan]
    np.testing.assert_equal(of(exps, x), [0, 0, 0, 1, 1, inf, inf, inf, nan])
    x = [0, -0.0, -1, 1e-40, 1, inf, -inf, nan]
    np.testing.assert_equal(of(logs, x), [-inf, -inf, nan, -inf, 0, inf, nan, nan])


def test_a_mask_picks_rows():
    x = np.random.default_rng(0).normal(size=(21, 3)).astype(np.float32)
    x[3], x[4] = np.nan, np.inf
    with np.errstate(invalid='ignore'):
        right = np.where((x[:, 0] > x[:, 1])[:, None], x, 0)
    np.testing.assert_array_equal(of(clamped, x), right)


def test_a_bool_picks_a_float():
    assert picked(True, np.float32(2), np.float32(3)) == 2
    assert picked(False, np.float32(2), np.float32(3)) == 3


def test_nan_is_unequal():
    assert unequal(np.zeros(8, np.float32)) == (False, True, False)
    assert unequal(np.full(8, np.nan, np.float32)) == (True, False, True)
