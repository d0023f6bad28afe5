"""Stage 1 in a minute: one part changed at a time, three seeds each, 64 x 64 pixels.

    python benchmarks/parts.py [--what printed,hyper,...] [--seeds 3] [--jobs 1]
        [--out results/parts.json]

What is changed: `printed`, each switch of the network as the paper has it, and all of them;
`hyper`, the rows of Tab. 7 that a small encoder can have; `residual`, `crosstime`, `attention`,
parts that a table of the paper tells of, where creases, flicker and a tracker's errors are zero,
as usual, or three times as large (page 95 has the first; the other two, and `hyper`, are hours
that were not spent yet). Every row trains the preset `tiny` on the same painted people
with the same draws, and is judged on strangers from the same world. Lines in the output file are
not made again.
"""

import argparse
import math
import multiprocessing as mp
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import common  # first: waiting threads shall sleep
from generator import line, scores

from spatialavatar0.ground.content import hash_of
from spatialavatar0.pictures.domains import held_out, mono, multi, people
from spatialavatar0.stage1.generator import AS_PRINTED, from_preset
from spatialavatar0.stage1.schedule import LAPTOP, MonoPhase, MultiPhase
from spatialavatar0.stage1.trainer import Shelf, Trainer, look_at_trials

SIZE, PEOPLE, SUBJECTS = 64, 80, 4
STEPS, STEPS2, BATCH, RATE, RATE2 = 800, 200, 2, 2e-3, 1e-3


class CosinePhase(MonoPhase):
    "Row b of Tab. 7: a cosine over all steps."

    def rate(self, t):
        return self.lr * self.ramp(t) * (0.5 + 0.5 * math.cos(math.pi * t / self.steps))


@dataclass(frozen=True)
class Row:
    "One way to train, and in which world."

    name: str
    network: dict = field(default_factory=dict)  # of GeneratorConfig
    first: dict = field(default_factory=dict)  # of Phase 1
    second: dict = None  # of Phase 2; None: there is none
    weights: dict = field(default_factory=dict)  # of the loss
    world: dict = field(default_factory=dict)  # of the domains
    kind: type = MonoPhase

    @property
    def arm(self):  # a name for all that it changes
        changes = self.network, self.first, self.second or {}, self.weights, self.world
        return hash_of(*changes, self.second is None, self.kind.__name__)


BARE = dict(bypass=False, shells=(0.0,))
SWITCHES = {
    'ours': {},
    'pool': dict(pool='plain'),
    'mirror': dict(mirror=False),
    'shells': dict(shells=(0.0,)),
    'bypass': BARE,
    'visibility': dict(BARE, pool='plain', visibility=False),
    'teeth': dict(teeth=False),
    'modulated': dict(modulated=True),
    'zero_film': dict(zero_film=True),
    'skull_view': dict(skull_view=False),
    'all': AS_PRINTED,
}
BOTH = dict(l2sp=1e-3, cross_time=0.25)  # the remedies of Phase 2
SLOWER = dict(BOTH, layer_decay=0.65)  # and an encoder whose first layers learn slowly
HYPER = {
    'a, e, h, k': {},
    'b cosine': dict(kind=CosinePhase),
    'c constant': dict(first=dict(lr_end=1.0)),
    'd rate x 0.4': dict(first=dict(lr=0.4 * RATE)),
    'f rate x 2': dict(first=dict(lr=2 * RATE)),
    'g decay .5': dict(second=dict(BOTH, layer_decay=0.5)),
    'i decay .8': dict(second=dict(BOTH, layer_decay=0.8)),
    'j view-Jacobian 0': dict(weights=dict(jacobian=0.0)),
    'l view-Jacobian 1': dict(weights=dict(jacobian=1.0)),
    'L2-SP 1e-4': dict(second=dict(SLOWER, l2sp=1e-4)),
}
WORLDS = {  # creases and blushes; flicker and tracking
    name: [
        dict(creases=times, flush=times),
        dict(flicker=0.03 * times, tracking=times),
    ]
    for name, times in {'x0': 0.0, 'x1': 1.0, 'x3': 3.0}.items()
}


def rows_of(what):
    "The rows of a group."
    if what == 'printed':
        return [Row(name, network=switches) for name, switches in SWITCHES.items()]
    if what == 'hyper':
        usual = dict(second=SLOWER, weights=dict(jacobian=0.1))
        return [Row(name, **{**usual, **changes}) for name, changes in HYPER.items()]
    rows = []
    for world, (faces, films) in WORLDS.items():
        if what == 'residual':
            rows += [
                Row(f'{name} {world}', dict(residual=name == 'with'), world=faces)
                for name in ('with', 'without')
            ]
        if what == 'crosstime':
            draws = {'with': BOTH, 'without': dict(BOTH, cross_time=0.0)}
            rows += [Row(f'{n} {world}', second=d, world=films) for n, d in draws.items()]
        if what == 'attention':
            pools = {'with': 'attention', 'without': 'plain'}
            rows += [Row(f'{n} {world}', dict(pool=p), world=films) for n, p in pools.items()]
    return rows


GROUPS = 'printed', 'hyper', 'residual', 'crosstime', 'attention'


@lru_cache(4)
def shelves(network, world, has_second):
    "Looks of the people of both phases, and those to be judged on; kept in memory."
    generator = from_preset('tiny', **dict(network))
    world = dict(world)
    crowds = [people(mono(SIZE, **world), PEOPLE)]
    if has_second:
        crowds.append(people(multi(SIZE, **world), SUBJECTS))
    looks = [Shelf(crowd, generator, limit=4e9) for crowd in crowds]
    tests = {name: look_at_trials(generator, held_out(name, SIZE, **world)) for name in ('mono',)}
    return looks, tests


def phases_of(row):
    weights = replace(LAPTOP, **row.weights)
    first = dict(dict(lr=RATE, warmup=50, fall=0.8), **row.first)
    phases = [row.kind(STEPS, BATCH, weights=weights, **first)]
    if row.second is not None:
        second = dict(row.second)
        held = replace(weights, residual=1e-2, l2sp=second.pop('l2sp'))
        phases.append(MultiPhase(STEPS2, BATCH, RATE2, held, warmup=30, **second))
    return phases


def run(job):
    "One line: a row, a seed."
    what, row, seed = job
    common.set_threads(1)
    looks_of = {k: v for k, v in row.network.items() if k in ('shells', 'teeth')}
    frozen = [tuple(x.items()) for x in (looks_of, row.world)]
    looks, tests = shelves(*frozen, row.second is not None)
    generator = from_preset('tiny', seed=seed, **row.network)
    begun = time.perf_counter()
    trainer = Trainer(generator, phases_of(row), looks, seed)
    trainer.run(show=False)
    if trainer.step_number < trainer.total:
        raise SystemExit('stopped; lines that are there are kept')
    return dict(
        row=f'{what}: {row.name}',
        arm=row.arm,
        seed=seed,
        seconds=round(time.perf_counter() - begun, 1),
        held_out=scores(generator.eval(), tests),
        **common.receipt(*looks),
    )


def command_line():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--what', default='printed,residual', help=', '.join(GROUPS))
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--out', default='results/parts.json')
    return parser.parse_args()


def main():
    options = command_line()
    out = Path(options.out)
    settings = dict(size=SIZE, people=PEOPLE, subjects=SUBJECTS, steps=STEPS, steps2=STEPS2)
    rows = common.lines_of(out, settings)
    done = {(row['row'], row['seed'], row['arm']) for row in rows}
    jobs = [
        (what, row, seed)
        for what in options.what.split(',')
        for row in rows_of(what)
        for seed in range(options.seeds)
    ]
    jobs = [job for job in jobs if (f'{job[0]}: {job[1].name}', job[2], job[1].arm) not in done]
    with ProcessPoolExecutor(options.jobs, mp_context=mp.get_context('spawn')) as pool:
        for ended in as_completed([pool.submit(run, job) for job in jobs]):
            rows.append(ended.result())
            told = rows[-1]
            print(
                f'{told["row"]:26} seed {told["seed"]}  '
                f'{line(told["held_out"])}  {told["seconds"]:.0f} s',
                flush=True,
            )
            common.save(out, dict(settings=settings, machine=common.machine(), rows=rows))


if __name__ == '__main__':
    main()
