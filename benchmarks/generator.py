"""Stage 1 measured: the shipped checkpoint and its numbers, and the tables of the two phases.

    python benchmarks/generator.py train --out DIR [--minutes 60 | --steps 12000] [--seed 0]
    python benchmarks/generator.py table [--rows A,B,C] [--seeds 3] [--out FILE] [--work DIR]
    python benchmarks/generator.py speed [--threads 2] [--out results/generator_speed.json]

`train` makes a checkpoint from painted people: DIR/generator.safetensors at the end,
DIR/mono.safetensors after Phase 1, DIR/curve.json with the loss and held-out numbers on the way.
Killed, the same command goes on. `table` trains every row from the same data and seeds; rows that
are in the output file already are not run again, and the Phase 1 that several rows start from is
trained once per seed.
"""

import argparse
import json
import math
import resource
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import common  # first: waiting threads shall sleep
import torch

from spatialavatar0.pictures.domains import held_out, mono, multi, people
from spatialavatar0.stage1.generator import from_preset, from_pretrained
from spatialavatar0.stage1.schedule import LAPTOP, MultiPhase, laptop_schedule
from spatialavatar0.stage1.trainer import Shelf, Trainer, look_at_trials, score_generator

TESTS = ('mono', 'multi', 'shifted')


def shelf(kind, count, generator, folder, size, **changes):
    "Looks of a training set, kept in a folder."
    domain = dict(mono=mono, multi=multi)[kind](size, **changes)
    started = time.perf_counter()
    painted = people(domain, count, head=generator.head)
    kept = Shelf(painted, generator, Path(folder) / f'{kind}_{count}x{len(domain)}_{size}')
    seconds, megabytes = time.perf_counter() - started, kept.records.nbytes / 1e6
    pictures = sum(kept.counts)
    print(
        f'{kind}: {count} people, {pictures} pictures, {megabytes:.0f} MB, {seconds:.0f} s',
        flush=True,
    )
    return kept


def tests(generator, size, names=TESTS):
    return {name: look_at_trials(generator, held_out(name, size)) for name in names}


def scores(generator, sets, Ks=(1, 4)):
    "Numbers on every test set and K, rounded."
    found = {}
    for name, trials in sets.items():
        by_K = {str(K): score_generator(generator, trials, K) for K in Ks}
        found[name] = {K: {k: round(v, 4) for k, v in row.items()} for K, row in by_K.items()}
    return found


def line(found):
    "Decibels inside the head, for the screen."
    parts = []
    for name, by_K in found.items():
        decibels = [f'K{K} {row["head_psnr"]:.2f}' for K, row in by_K.items()]
        parts.append(f'{name} {" ".join(decibels)}')
    return '  '.join(parts)


# ---- the checkpoint


def measured_steps(given, data):
    "How many steps fit into the minutes: by the pace of 25, after 5 to warm up."
    plan = laptop_schedule(100, 0, batch=given.batch)
    trainer = Trainer(from_preset(given.preset), plan, data[:1])
    trainer.run(5)
    before = trainer.seconds
    trainer.run(25)
    return int(given.minutes * 60 * 25 / (trainer.seconds - before))


def plan_of(given, data, folder):
    "Steps of both phases; measured from the time given, once, and written down."
    path = folder / 'plan.json'
    if path.exists():
        return json.loads(path.read_text())
    steps = given.steps or measured_steps(given, data)
    plan = dict(
        mono_steps=int(steps * (1 - given.share)),
        multi_steps=int(steps * given.share),
    )
    common.save(path, plan)
    return plan


def about(given, plan, size):
    "What a checkpoint says of its training."
    names = 'share', 'seed', 'people', 'subjects', 'batch', 'lr', 'multi_lr', 'preset'
    options = [f'--{name.replace("_", "-")} {getattr(given, name)}' for name in names]
    steps = sum(plan.values())
    command = f'python benchmarks/generator.py train --out DIR --steps {steps} {" ".join(options)}'
    data = dict(
        mono=f'people(mono({size}), {given.people})',
        multi=f'people(multi({size}, instants=6), {given.subjects})',
    )
    return dict(command=command, seed=given.seed, data=data, **plan)


class Watch:
    "Follows a training: Phase 1's checkpoint, and held-out numbers every few minutes."

    def __init__(self, folder, sets, plan, words, every):
        self.folder, self.sets, self.words, self.every = folder, sets, words, every
        self.mono_steps = plan['mono_steps']
        self.curve = folder / 'curve.json'
        self.held = []
        self.last = time.monotonic()

    def go_on_from(self, step):
        "What was measured before a training was stopped."
        if self.curve.exists():
            rows = json.loads(self.curve.read_text())['held_out']
            self.held = [row for row in rows if row['step'] <= step]

    def __call__(self, trainer):
        step, generator = trainer.step_number, trainer.generator
        if step == self.mono_steps:
            generator.save(self.folder / 'mono.safetensors', **self.words)
        at_end = step in (self.mono_steps, trainer.total)
        if not at_end and time.monotonic() - self.last < 60 * self.every:
            return
        if at_end:
            found = scores(generator, self.sets, (1, 2, 3, 4))
        else:
            found = scores(generator, {name: self.sets[name] for name in TESTS[:2]}, (4,))
        self.held.append(dict(step=step, seconds=round(trainer.seconds), **found))
        self.tell(trainer, found)
        self.last = time.monotonic()

    def tell(self, trainer, found):
        "To the file and the screen."
        log = dict(machine=common.machine(), log=trainer.log, held_out=self.held)
        common.save(self.curve, dict(self.words, **log))
        loss = f'loss {trainer.log[-1]["loss"]:.4f} ' if trainer.log else ''
        done = f'step {trainer.step_number}/{trainer.total}  {trainer.seconds:.0f} s '
        print(done, loss, line(found), flush=True)


def train(given):
    "One checkpoint."
    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    generator = from_preset(given.preset, seed=given.seed)
    size, looks = generator.config.image_size, given.looks or folder / 'looks'
    many = shelf('mono', given.people, generator, looks, size)
    few = shelf('multi', given.subjects, generator, looks, size, instants=6)
    plan = plan_of(given, [many, few], folder)
    sets = tests(generator, size)
    print('steps:', plan, flush=True)
    rates = dict(lr=given.lr, multi_lr=given.multi_lr)
    phases = laptop_schedule(plan['mono_steps'], plan['multi_steps'], given.batch, **rates)
    trainer = Trainer(generator, phases, [many, few], given.seed)
    state, words = folder / 'state.safetensors', about(given, plan, size)
    if state.exists():
        trainer.load(state)
        print('going on from step', trainer.step_number, flush=True)
    watch = Watch(folder, sets, plan, words, given.every)
    watch.go_on_from(trainer.step_number)
    trainer.run(state=state, callback=watch, show=False)
    if trainer.step_number < trainer.total:
        return
    path = folder / 'generator.safetensors'
    generator.save(path, **words, held_out=watch.held[-1] if watch.held else None)
    print(f'{path}: {path.stat().st_size / 1e6:.1f} MB', flush=True)


# ---- the table

ARMS = {  # Phase 2: lambda of L2-SP, chance of a cross-time draw
    'B': (0.0, 0.0),
    'L2-SP 1e-3': (1e-3, 0.0),
    'L2-SP 1e-2': (1e-2, 0.0),
    'mix': (0.0, 0.25),
    'C 1e-3': (1e-3, 0.25),
    'C 1e-2': (1e-2, 0.25),
}
VARIANTS = {  # another network, or another loss, in both phases
    'plain pool': dict(pool='plain'),
    'attention pool': dict(pool='attention'),
    'no residual': dict(residual=False),
    'view-Jacobian': {},
}
ROWS = ['A', *ARMS]
for variant in VARIANTS:
    ROWS += [f'A {variant}', f'C 1e-2 {variant}']


def parse_row(row):
    "'C 1e-2 plain pool' -> arm 'C 1e-2', variant 'plain pool'."
    variant = next((name for name in VARIANTS if row.endswith(name)), '')
    arm = row[: len(row) - len(variant)].strip()
    if arm != 'A' and arm not in ARMS:
        raise SystemExit(f'no row is called {row!r}; there are {", ".join(ROWS)}')
    return arm, variant


def weights_of(variant, **changes):
    jacobian = 0.1 if variant == 'view-Jacobian' else 0.0
    return replace(LAPTOP, jacobian=jacobian, **changes)


def run_whole(trainer, **options):
    "Train to the end; a training that was stopped is no row."
    trainer.run(show=False, **options)
    if trainer.step_number < trainer.total:
        raise SystemExit(1)


def phase1(variant, seed, given, data, work):
    "A trained Phase 1, and the seconds it took; kept for the other rows of this seed."
    path = work / f'A_{variant or "base"}_{seed}.safetensors'.replace(' ', '_')
    if path.exists():
        return from_pretrained(path), 0.0
    generator = from_preset('laptop', seed=seed, **VARIANTS.get(variant, {}))
    phases = laptop_schedule(given.steps, 0, given.batch, weights_of(variant))
    trainer = Trainer(generator, phases, [data[0]], seed)
    state = path.with_name('state_' + path.name)
    if state.exists():
        trainer.load(state)
    run_whole(trainer, state=state)
    generator.save(path, steps=given.steps, seed=seed)
    state.unlink(missing_ok=True)
    return generator, trainer.seconds


def phase2(generator, arm, variant, seed, given, data):
    "Phase 2 of an arm; the seconds it took, and its last line of the log."
    l2sp, cross_time = ARMS[arm]
    weights = weights_of(variant, residual=1e-2, l2sp=l2sp)
    options = dict(warmup=30, cross_time=cross_time)
    phase = MultiPhase(given.steps2, given.batch, given.lr2, weights, **options)
    trainer = Trainer(generator.train(), [phase], [data[1]], seed)
    run_whole(trainer)
    return trainer.seconds, trainer.log[-1]


def run(row, seed, given, data, sets, work):
    "One line of the table."
    arm, variant = parse_row(row)
    generator, seconds = phase1(variant, seed, given, data, work)
    last = {}
    if arm != 'A':
        seconds, last = phase2(generator, arm, variant, seed, given, data)
    every_K = arm in ('A', 'C 1e-2') and not variant
    found = scores(generator.eval(), sets, (1, 2, 3, 4) if every_K else (1, 4))
    line = dict(row=row, seed=seed, seconds=round(seconds, 1), last=last, held_out=found)
    return dict(line, **common.receipt(*data))


def spread(values):
    "Mean +- standard deviation."
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f'{mean:6.2f}' + ' ' * 7
    squares = sum((value - mean) ** 2 for value in values)
    return f'{mean:6.2f} +-{math.sqrt(squares / (len(values) - 1)):.2f}'


def column(rows, test, K, what):
    return [row['held_out'][test][str(K)][what] for row in rows]


def print_table(rows):
    "Means and spreads over seeds: head-only PSNR, and whole-picture PSNR and SSIM at K = 4."
    heads = ''.join(f'{name + " K1":>14}{name + " K4":>14}' for name in TESTS)
    print(f'\n{"":26}seeds  {heads}{"mono whole":>12}{"SSIM":>8}')
    by_name = {name: [row for row in rows if row['row'] == name] for name in ROWS}
    by_name = {name: found for name, found in by_name.items() if found}
    for name, found in by_name.items():
        decibels = [spread(column(found, t, K, 'head_psnr')) for t in TESTS for K in (1, 4)]
        cells = ''.join(f'{cell:>14}' for cell in decibels)
        whole = spread(column(found, 'mono', 4, 'psnr'))[:6]
        similar = sum(column(found, 'mono', 4, 'ssim')) / len(found)
        print(f'{name:26}{len(found):5}  {cells}{whole:>12}{similar:8.3f}')
    for name in ('A', 'C 1e-2'):
        if name in by_name:
            print_by_K(name, by_name[name])


def print_by_K(name, rows):
    parts = []
    for test in TESTS:
        cells = [spread(column(rows, test, K, 'head_psnr')).strip() for K in (1, 2, 3, 4)]
        parts.append(f'{test} {" ".join(cells)}')
    print(f'{name}, K = 1..4: {"; ".join(parts)}')


def rows_so_far(out, settings):
    "What an earlier run wrote, with the same settings."
    if not out.exists():
        return []
    old = json.loads(out.read_text())
    if old['settings'] != settings:
        raise SystemExit(
            f'{out} holds a table with other settings, {old["settings"]}; give another --out'
        )
    return old['rows']


def table(given):
    "Every row and seed that is not in the file yet."
    work, out = Path(given.work), Path(given.out)
    work.mkdir(parents=True, exist_ok=True)
    names = 'people', 'subjects', 'steps', 'steps2', 'batch', 'lr2'
    settings = {name: getattr(given, name) for name in names}
    rows = rows_so_far(out, settings)
    done = {(row['row'], row['seed']) for row in rows}
    wanted = [(row, seed) for seed in range(given.seeds) for row in given.rows.split(',')]
    todo = [pair for pair in wanted if pair not in done]
    for row, _ in todo:
        parse_row(row)
    if todo:
        generator = from_preset('laptop')
        many = shelf('mono', given.people, generator, work, 128)
        few = shelf('multi', given.subjects, generator, work, 128, instants=6)
        sets = tests(generator, 128)
    for row, seed in todo:
        found = run(row, seed, given, [many, few], sets, work)
        rows.append(found)
        told = line(found['held_out'])
        print(f'{row:26} seed {seed}: {told}  {found["seconds"]:.0f} s', flush=True)
        ordered = sorted(rows, key=lambda x: (ROWS.index(x['row']), x['seed']))
        common.save(out, dict(settings=settings, machine=common.machine(), rows=ordered))
    print_table(rows)


# ---- speed


def pace(trainer, steps=40):
    "Milliseconds a step, by the clock and of all threads, after ten steps to warm up."
    trainer.run(10, show=False)
    before, cpu = trainer.seconds, time.process_time()
    trainer.run(steps, show=False)
    wall, cpu = trainer.seconds - before, time.process_time() - cpu
    return dict(wall_ms=round(1e3 * wall / steps, 1), cpu_ms=round(1e3 * cpu / steps, 1))


def speed(given):
    "Milliseconds per step at batch 4, and what they are spent on."
    generator = from_preset('laptop')
    data = [Shelf(people(mono(), 12), generator)]
    losses = {
        'L1 + SSIM + TV': replace(LAPTOP, offset=0.0),
        'laptop': LAPTOP,
        'full, without LPIPS': replace(LAPTOP, ssim=0.0, ms_ssim=1.0, face=1.0, jacobian=0.1),
    }
    out = {}
    for name, weights in losses.items():
        trainer = Trainer(generator, laptop_schedule(1000, 0, 4, weights), data)
        out[name] = pace(trainer)
    out['parts'] = parts(trainer)
    out['memory_mb'] = peak_mb()
    print(json.dumps(out))
    common.save(given.out, dict(out, machine=common.machine()))


def parts(trainer):
    "Milliseconds of the pieces of one laptop step, forward and backward."
    batch, generator = trainer.draw(), trainer.generator
    looks = batch.targets
    directions = torch.stack([generator.direction(x.viewmat, x.params) for x in looks])

    def decoded():
        return generator.decode(generator.encode(batch.sources), directions)

    def networks():
        sum(values.square().sum() for values in decoded().maps.values()).backward()

    with torch.no_grad():
        splats = decoded().splats
    leaves = [{k: v.detach().requires_grad_() for k, v in person.items()} for person in splats]

    def posing_and_rasterizing():
        drawn = zip(leaves, batch.targets, batch.backgrounds)
        sum(generator.draw(*person)[0].sum() for person in drawn).backward()

    def optimiser():
        torch.nn.utils.clip_grad_norm_(trainer.params, 5.0)
        trainer.opt.step()

    step = partial(trainer.backward, batch, LAPTOP)
    step()
    pieces = dict(draw=trainer.draw, step=step, networks=networks)
    pieces.update(posing_and_rasterizing=posing_and_rasterizing, optimiser=optimiser)
    return {name: round(common.wall_ms(piece, 10), 1) for name, piece in pieces.items()}


def peak_mb():
    "Largest resident memory of this process so far, megabytes."
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


# ---- the command line

TRAIN = dict(
    out='out/generator',
    minutes=60.0,
    steps=0,
    share=0.2,
    seed=0,
    threads=2,
    people=600,
    subjects=16,
    batch=4,
    lr=2e-3,
    multi_lr=1e-3,
    preset='laptop',
    every=4.0,
    looks=None,
)
TABLE = dict(
    rows=','.join(ROWS),
    seeds=3,
    threads=1,
    people=200,
    subjects=4,
    steps=1400,
    steps2=400,
    batch=2,
    lr2=2e-3,
    work='out/generator_table',
    out='results/generator_128.json',
)
SPEED = dict(threads=2, out='results/generator_speed.json')


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest='what', required=True)
    for name, defaults in dict(train=TRAIN, table=TABLE, speed=SPEED).items():
        command = commands.add_parser(name)
        for option, default in defaults.items():
            kind = str if default is None else type(default)
            command.add_argument('--' + option.replace('_', '-'), type=kind, default=default)
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    common.set_threads(given.threads)
    dict(train=train, table=table, speed=speed)[given.what](given)


if __name__ == '__main__':
    main()
