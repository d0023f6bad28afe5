"""How fast people are painted: somebody new, a frame of each domain, and what each effect costs.

    python benchmarks/people.py [--size 128] [--repeats 40] [--out results/people.json]

CPU time of one thread, milliseconds: the best and the median of several different people or frames, after a warm-up.
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


def clock(f, repeats):
    "Milliseconds of f(0), f(1), ...: best and median."
    f(0)
    times = []
    for k in range(repeats):
        start = time.thread_time()
        f(k)
        times.append(1e3 * (time.thread_time() - start))
    return dict(best=round(min(times), 2), median=round(median(times), 2))


def frames(domain, head):
    "Paints the k-th frame of two people, both drawn beforehand."
    crowd = people(domain, 2, seed=99, head=head)
    n = len(domain)
    for i in range(2):
        crowd[i][0]
    return lambda k: crowd[k // n % 2][k % n]


def rows(head, size, repeats):
    "Name -> milliseconds."
    yield (
        'a new person',
        clock(lambda k: make_character(person_seed(1, 99, k), head), max(5, repeats // 3)),
    )
    yield 'a new person of page 34', clock(lambda k: make_person(k, head), max(5, repeats // 3))
    for d in (mono(size), multi(size), shifted(size)):
        yield f'a frame of {d.name}', clock(frames(d, head), repeats)
    bare = mono(size, creases=0.0, flush=0.0)
    yield 'mono without wrinkles and blush', clock(frames(bare, head), repeats)
    yield (
        'mono without anything',
        clock(frames(replace(bare, flicker=0.0, tracking=0.0), head), repeats),
    )
    p = make_character(0, head)
    e = torch.rand(40, 1, head.num_expr, generator=torch.Generator().manual_seed(0))
    yield 'wrinkles and blush alone', clock(lambda k: emote(p, e[k % 40], head), repeats)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--size', type=int, default=128)
    p.add_argument('--repeats', type=int, default=40)
    p.add_argument('--out', default='results/people.json')
    a = p.parse_args()
    set_seed(0)
    set_threads(1)
    head = open_head()
    found = {}
    print(f'{"":34}{"best":>9}{"median":>9}   milliseconds; {a.size} x {a.size}, one thread')
    for name, ms in rows(head, a.size, a.repeats):
        found[name] = ms
        rate = f'   {1e3 / ms["median"]:.0f} a second'
        print(f'{name:34}{ms["best"]:9.2f}{ms["median"]:9.2f}{rate}', flush=True)
    save(a.out, dict(machine=machine(), size=a.size, repeats=a.repeats, milliseconds=found))


if __name__ == '__main__':
    main()
