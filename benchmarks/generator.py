"""Stage 1 measured: the shipped checkpoint and its numbers, and the tables of the two phases.

    python benchmarks/generator.py train --out DIR [--minutes 60 | --steps 12000] [--seed 0] [--threads 2]
    python benchmarks/generator.py table [--rows A,B,C] [--seeds 3] [--out results/generator_128.json] [--work DIR]
    python benchmarks/generator.py speed [--threads 2] [--out results/generator_speed.json]

`train` makes a checkpoint from painted people: DIR/generator.safetensors at the end, DIR/mono.safetensors after Phase 1, DIR/curve.json
with the loss and held-out numbers on the way. Killed, the same command goes on. `table` trains every row from the same data and seeds;
rows that are in the output file already are not run again, and the Phase 1 that several rows start from is trained once per seed.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import common  # first: waiting threads shall sleep
import torch

from spatialavatar0.pictures.domains import held_out, mono, multi, people
from spatialavatar0.stage1.generator import from_preset, from_pretrained
from spatialavatar0.stage1.schedule import LAPTOP, MultiPhase, laptop_schedule
from spatialavatar0.stage1.trainer import Shelf, Trainer, evaluate, looked

TESTS = ('mono', 'multi', 'shifted')


def shelf(kind, n, generator, folder, size, **changes):
    "Looks of a training set, kept in a folder."
    make = dict(mono=mono, multi=multi)[kind]
    d = make(size, **changes)
    t = time.perf_counter()
    s = Shelf(
        people(d, n, head=generator.head), generator, Path(folder) / f'{kind}_{n}x{len(d)}_{size}'
    )
    print(
        (
            f'{kind}: {n} people, {sum(s.counts)} pictures, {s.records.nbytes / 1e6:.0f} MB, '
            f'{time.perf_counter() - t:.0f} s'
        ),
        flush=True,
    )
    return s


def tests(generator, size, names=TESTS):
    return {n: looked(generator, held_out(n, size)) for n in names}


def scores(generator, sets, Ks=(1, 4)):
    "Numbers on every test set and K, rounded."
    return {
        name: {
            str(K): {k: round(v, 4) for k, v in evaluate(generator, trials, K).items()} for K in Ks
        }
        for name, trials in sets.items()
    }


def line(s):
    return '  '.join(
        f'{n} ' + ' '.join(f'K{K} {v["head_psnr"]:.2f}' for K, v in by.items())
        for n, by in s.items()
    )


# ---- the checkpoint


def plan(a, generator, data, folder):
    "Steps of both phases; measured from the time given, once, and written down."
    path = folder / 'plan.json'
    if path.exists():
        return json.loads(path.read_text())
    steps = a.steps
    if not steps:
        t = Trainer(from_preset(a.preset), laptop_schedule(100, 0, batch=a.batch), data[:1])
        t.run(5)
        before = t.seconds
        t.run(25)
        steps = int(a.minutes * 60 * 25 / (t.seconds - before))
    p = dict(mono_steps=int(steps * (1 - a.share)), multi_steps=int(steps * a.share))
    common.save(path, p)
    return p


def train(a):
    "One checkpoint."
    torch.set_flush_denormal(True)
    common.set_threads(a.threads)
    folder = Path(a.out)
    folder.mkdir(parents=True, exist_ok=True)
    g = from_preset(a.preset, seed=a.seed)
    size = g.config.image_size
    looks = a.looks or folder / 'looks'
    data = [
        shelf('mono', a.people, g, looks, size),
        shelf('multi', a.subjects, g, looks, size, instants=6),
    ]
    p = plan(a, g, data, folder)
    sets = tests(g, size)
    print('steps:', p, flush=True)
    t = Trainer(
        g,
        laptop_schedule(p['mono_steps'], p['multi_steps'], a.batch, lr=a.lr, multi_lr=a.multi_lr),
        data,
        a.seed,
    )
    state = folder / 'state.safetensors'
    curve = folder / 'curve.json'
    if state.exists():
        t.load(state)
        print('going on from step', t.step_number, flush=True)
    held = [
        r
        for r in (json.loads(curve.read_text())['held_out'] if curve.exists() else [])
        if r['step'] <= t.step_number
    ]
    command = (
        f'python benchmarks/generator.py train --out DIR --steps {sum(p.values())} --share '
        f'{a.share} --seed {a.seed} --people {a.people} --subjects {a.subjects} --batch {a.batch} --lr {a.lr} --multi-lr {a.multi_lr} --preset {a.preset}'
    )
    about = dict(
        command=command,
        seed=a.seed,
        data=dict(
            mono=f'people(mono({size}), {a.people})',
            multi=f'people(multi({size}, instants=6), {a.subjects})',
        ),
        **p,
    )
    last = [time.monotonic()]

    def watch(t):
        at_end = t.step_number in (p['mono_steps'], t.total)
        if t.step_number == p['mono_steps']:
            g.save(folder / 'mono.safetensors', **about)
        if not at_end and time.monotonic() - last[0] < 60 * a.every:
            return
        s = (
            scores(g, sets, (1, 2, 3, 4) if at_end else (1, 4))
            if at_end
            else scores(g, {k: sets[k] for k in ('mono', 'multi')}, (4,))
        )
        held.append(dict(step=t.step_number, seconds=round(t.seconds), **s))
        common.save(curve, dict(about, machine=common.machine(), log=t.log, held_out=held))
        print(
            f'step {t.step_number}/{t.total}  {t.seconds:.0f} s ',
            f'loss {t.log[-1]["loss"]:.4f} ' if t.log else '',
            line(s),
            flush=True,
        )
        last[0] = time.monotonic()

    t.run(state=state, callback=watch, show=False)
    if t.step_number < t.total:
        return
    g.save(folder / 'generator.safetensors', **about, held_out=held[-1] if held else None)
    print(
        (
            f'{folder / "generator.safetensors"}: '
            f'{(folder / "generator.safetensors").stat().st_size / 1e6:.1f} MB'
        ),
        flush=True,
    )


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
ROWS = ['A', *ARMS, *(f'{p} {v}' for v in VARIANTS for p in ('A', 'C 1e-2'))]


def parse_row(row):
    "'C 1e-2 plain pool' -> arm 'C 1e-2', variant 'plain pool'."
    v = next((v for v in VARIANTS if row.endswith(v)), '')
    arm = row[: len(row) - len(v)].strip()
    if arm != 'A' and arm not in ARMS:
        raise SystemExit(f'no row is called {row!r}; there are {", ".join(ROWS)}')
    return arm, v


def phase1(variant, seed, a, data, work):
    "A trained Phase 1, and the seconds it took; kept for the other rows of this seed."
    path = work / f'A_{variant or "base"}_{seed}.safetensors'.replace(' ', '_')
    g = from_preset('laptop', seed=seed, **VARIANTS.get(variant, {}))
    if path.exists():
        return from_pretrained(path), 0.0
    w = replace(LAPTOP, jacobian=0.1) if variant == 'view-Jacobian' else LAPTOP
    t = Trainer(g, laptop_schedule(a.steps, 0, a.batch, w), [data[0]], seed)
    state = path.with_name('state_' + path.name)
    if state.exists():
        t.load(state)
    t.run(state=state, show=False)
    if t.step_number < t.total:
        raise SystemExit(1)
    g.save(path, steps=a.steps, seed=seed)
    state.unlink(missing_ok=True)
    return g, t.seconds


def run(row, seed, a, data, sets, work):
    "One line of the table."
    arm, variant = parse_row(row)
    g, seconds = phase1(variant, seed, a, data, work)
    terms = {}
    if arm != 'A':
        sp, mix = ARMS[arm]
        w = replace(
            LAPTOP, residual=1e-2, l2sp=sp, jacobian=0.1 if variant == 'view-Jacobian' else 0.0
        )
        t = Trainer(
            g.train(),
            [MultiPhase(a.steps2, a.batch, a.lr2, w, warmup=30, cross_time=mix)],
            [data[1]],
            seed,
        )
        t.run(show=False)
        if t.step_number < t.total:
            raise SystemExit(1)
        seconds = t.seconds
        terms = t.log[-1]
    return dict(
        row=row,
        seed=seed,
        seconds=round(seconds, 1),
        last=terms,
        held_out=scores(
            g.eval(), sets, (1, 2, 3, 4) if arm in ('A', 'C 1e-2') and not variant else (1, 4)
        ),
    )


def spread(values):  # mean +- standard deviation
    m = sum(values) / len(values)
    return f'{m:6.2f}' + (
        f' +-{math.sqrt(sum((v - m) ** 2 for v in values) / (len(values) - 1)):.2f}'
        if len(values) > 1
        else ' ' * 7
    )


def print_table(rows):
    "Means and spreads over seeds: head-only PSNR, and whole-picture PSNR and SSIM at K = 4."
    print(
        f'\n{"":26}seeds  '
        + ''.join(f'{n + " K1":>14}{n + " K4":>14}' for n in TESTS)
        + f'{"mono whole":>12}{"SSIM":>8}'
    )
    for name in [r for r in ROWS if any(x['row'] == r for x in rows)]:
        r = [x for x in rows if x['row'] == name]

        def of(n, K, k):
            return [x['held_out'][n][K][k] for x in r]

        cells = ''.join(f'{spread(of(n, K, "head_psnr")):>14}' for n in TESTS for K in ('1', '4'))
        print(
            f'{name:26}{len(r):5}  '
            f'{cells}{spread(of("mono", "4", "psnr"))[:6]:>12}{sum(of("mono", "4", "ssim")) / len(r):8.3f}'
        )
    for name in ('A', 'C 1e-2'):
        r = [x for x in rows if x['row'] == name]
        if r:
            print(
                f'{name}, K = 1..4: '
                + '; '.join(
                    f'{n} '
                    + ' '.join(
                        spread([x['held_out'][n][str(K)]['head_psnr'] for x in r]).strip()
                        for K in (1, 2, 3, 4)
                    )
                    for n in TESTS
                )
            )


def table(a):
    torch.set_flush_denormal(True)
    common.set_threads(a.threads)
    work, out = Path(a.work), Path(a.out)
    work.mkdir(parents=True, exist_ok=True)
    settings = dict(
        people=a.people,
        subjects=a.subjects,
        steps=a.steps,
        steps2=a.steps2,
        batch=a.batch,
        lr2=a.lr2,
    )
    old = json.loads(out.read_text()) if out.exists() else dict(settings=settings, rows=[])
    if old['settings'] != settings:
        raise SystemExit(
            f'{out} holds a table with other settings, {old["settings"]}; give another --out'
        )
    rows = old['rows']
    todo = [
        (r, s)
        for s in range(a.seeds)
        for r in a.rows.split(',')
        if not any((x['row'], x['seed']) == (r, s) for x in rows)
    ]
    for r, _ in todo:
        parse_row(r)
    if todo:
        g = from_preset('laptop')
        data = [
            shelf('mono', a.people, g, work, 128),
            shelf('multi', a.subjects, g, work, 128, instants=6),
        ]
        sets = tests(g, 128)
    for r, s in todo:
        rows.append(run(r, s, a, data, sets, work))
        print(
            f'{r:26} seed {s}: {line(rows[-1]["held_out"])}  {rows[-1]["seconds"]:.0f} s',
            flush=True,
        )
        common.save(
            out,
            dict(
                settings=settings,
                machine=common.machine(),
                rows=sorted(rows, key=lambda x: (ROWS.index(x['row']), x['seed'])),
            ),
        )
    print_table(rows)


# ---- speed


def speed(a):
    "Milliseconds per step at batch 4, and what they are spent on."
    torch.set_flush_denormal(True)
    common.set_threads(a.threads)
    g = from_preset('laptop')
    data = [Shelf(people(mono(), 12), g)]
    out = {}
    full = dict(ssim=0.0, ms_ssim=1.0, face=1.0, jacobian=0.1)
    for name, w in {
        'L1 + SSIM + TV': replace(LAPTOP, offset=0.0),
        'laptop': LAPTOP,
        'full, without LPIPS': replace(LAPTOP, **full),
    }.items():
        t = Trainer(g, laptop_schedule(1000, 0, 4, w), data)
        t.run(10, show=False)
        before, cpu = t.seconds, time.process_time()
        t.run(40, show=False)
        out[name] = dict(
            wall_ms=round(1e3 * (t.seconds - before) / 40, 1),
            cpu_ms=round(1e3 * (time.process_time() - cpu) / 40, 1),
        )  # CPU time: of all threads
    out['parts'] = parts(t)
    out['memory_mb'] = peak_mb()
    print(json.dumps(out))
    return dict(out, machine=common.machine())


def parts(t):
    "Milliseconds of the pieces of one laptop step, forward and backward."
    b = t.draw()
    g = t.generator
    w = LAPTOP

    def networks():
        d = g.decode(g.encode(b.sources), torch.stack([l.direction for l in b.targets]))
        (sum(m.square().sum() for m in d.maps.values())).backward()

    with torch.no_grad():
        d = g.decode(g.encode(b.sources), torch.stack([l.direction for l in b.targets]))
    leaves = [{k: v.detach().requires_grad_() for k, v in s.items()} for s in d.splats]

    def drawing():
        sum(
            g.draw(s, l, c)[0].sum() for s, l, c in zip(leaves, b.targets, b.backgrounds)
        ).backward()

    def optimise():
        torch.nn.utils.clip_grad_norm_(t.params, 5.0)
        t.opt.step()

    t.backward(b, w)
    return {
        k: round(common.wall_ms(f, 10), 1)
        for k, f in dict(
            draw=t.draw,
            step=lambda: t.backward(b, w),
            networks=networks,
            posing_and_rasterizing=drawing,
            optimiser=optimise,
        ).items()
    }


def peak_mb():
    "Largest resident memory of this process so far, megabytes."
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sub = p.add_subparsers(dest='what', required=True)

    def command(name, **defaults):
        q = sub.add_parser(name)
        for k, v in defaults.items():
            q.add_argument(
                '--' + k.replace('_', '-'), type=type(v) if v is not None else str, default=v
            )

    command(
        'train',
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
    command(
        'table',
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
    command('speed', threads=2, out='results/generator_speed.json')
    a = p.parse_args()
    if a.what == 'speed':
        common.save(a.out, speed(a))
    else:
        (train if a.what == 'train' else table)(a)


if __name__ == '__main__':
    main()
