"""How fast people are painted: somebody new, a frame of each domain, and what each effect costs.

    python benchmarks/people.py [--size 128] [--repeats 40] [--out results/people.json]

CPU time of one thread, milliseconds: the best and the median of several different people or
frames, after a warm-up.
"""

import argparse
import time
from dataclasses import replace
from statistics import median

import torch
from common import machine, save, set_threads

from spatialavatar0.ground.core import set_seed
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.domains import (
    emote,
    make_character,
    mono,
    multi,
    people,
    person_seed,
    shifted,
)
from spatialavatar0.pictures.people import make_person


def clock(work, repeats):
    "Milliseconds of work(0), work(1), ...: best and median."
    work(0)
    times = []
    for k in range(repeats):
        start = time.thread_time()
        work(k)
        times.append(1e3 * (time.thread_time() - start))
    return dict(best=round(min(times), 2), median=round(median(times), 2))


def frames(domain, head):
    "Paints the k-th frame of two people, both drawn beforehand."
    crowd = people(domain, 2, seed=99, head=head)
    length = len(domain)
    for i in range(2):
        crowd[i][0]
    return lambda k: crowd[k // length % 2][k % length]


def rows(head, size, repeats):
    "Name -> milliseconds, one after the other."
    few = max(5, repeats // 3)
    yield 'a new person', clock(lambda k: make_character(person_seed(1, 99, k), head), few)
    yield 'a new person of page 34', clock(lambda k: make_person(k, head), few)
    for domain in (mono(size), multi(size), shifted(size)):
        yield f'a frame of {domain.name}', clock(frames(domain, head), repeats)
    bare = mono(size, creases=0.0, flush=0.0)
    yield 'mono without wrinkles and blush', clock(frames(bare, head), repeats)
    still = replace(bare, flicker=0.0, tracking=0.0)
    yield 'mono without anything', clock(frames(still, head), repeats)
    someone = make_character(0, head)
    exprs = torch.rand(40, 1, head.num_expr, generator=torch.Generator().manual_seed(0))
    yield 'wrinkles and blush alone', clock(lambda k: emote(someone, exprs[k % 40], head), repeats)


def options():
    "What the command line asks for."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--size', type=int, default=128)
    parser.add_argument('--repeats', type=int, default=40)
    parser.add_argument('--out', default='results/people.json')
    return parser.parse_args()


def main():
    given = options()
    size = given.size
    set_seed(0)
    set_threads(1)
    head = open_head()
    found = {}
    print(f'{"":34}{"best":>9}{"median":>9}   milliseconds; {size} x {size}, one thread')
    for name, ms in rows(head, size, given.repeats):
        found[name] = ms
        rate = f'   {1e3 / ms["median"]:.0f} a second'
        print(f'{name:34}{ms["best"]:9.2f}{ms["median"]:9.2f}{rate}', flush=True)
    result = dict(machine=machine(), size=size, repeats=given.repeats, milliseconds=found)
    save(given.out, result)


if __name__ == '__main__':
    main()
