"""A step of Stage 2 by this version of the kit and by an earlier one, which take turns.

    python benchmarks/turns.py --before COMMIT [--sizes 256,512] [--threads 1,2] [--blocks 8]
        [--steps 20] [--configs default,fast] [--out results/turns.json]

Each version runs in a process of its own, on the same clip and from the same start; one works at a
time: a block of steps here, a block there, and so on. One thread: CPU time of a step, the best
block; two: wall time, so let the machine rest. `default` is what `RefineConfig()` is in that
version, from the first step on with all its terms; `fast` needs a version that has it.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import common  # first: waiting threads shall sleep
import torch

HERE = Path(__file__).resolve()
TEXELS = {128: 64, 256: 128, 512: 256}  # per side of the UV grid, by pixels


def config_of(name):
    "A configuration by name, with every term from the first step on."
    from spatialavatar0.stage2 import refine

    made = refine.RefineConfig() if name == 'default' else getattr(refine, f'{name}_config')()
    return replace(made, freeze=0, aspect_from=0)


def filmed(folder, size, name):
    "A refinement on a clip from disk, all its pictures looked at once."
    from spatialavatar0.avatar.portrait import from_frame
    from spatialavatar0.pictures.formats import load_clip
    from spatialavatar0.stage2.loop import Refinement
    from spatialavatar0.stage2.refine import start_frame

    train = load_clip(folder, split='train')
    start = from_frame(train[start_frame(train)], TEXELS[size])
    run = Refinement(start, train, config_of(name), 10_000)
    for i in range(len(train)):
        run.view(i)
    return run


def work(folder, size, name, threads):
    "The child: for every line that comes in, so many steps; a line of seconds goes out."
    from spatialavatar0.stage2.loop import calm

    common.set_threads(threads)
    run = filmed(folder, size, name)
    print(json.dumps(dict(gaussians=len(run.avatar))), flush=True)
    with calm(size**2):
        for line in sys.stdin:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(int(line)):
                run.step()
            took = dict(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)
            print(json.dumps(took), flush=True)


@contextlib.contextmanager
def worker(source, *words):
    "A process that uses the package of a folder; yields a function that asks it for steps."
    command = [sys.executable, str(HERE), '--child', *map(str, words)]
    environment = dict(os.environ, PYTHONPATH=str(source))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment, cwd=source, **pipes) as child:

        def ask(steps):
            child.stdin.write(f'{steps}\n')
            child.stdin.flush()
            return json.loads(child.stdout.readline())

        try:
            yield json.loads(child.stdout.readline()), ask
        finally:
            child.stdin.close()


@contextlib.contextmanager
def checkout(commit):
    "A folder with the kit as it was."
    root = HERE.parents[1]
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run(
            ['git', 'archive', commit], cwd=root, capture_output=True, check=True
        )
        subprocess.run(['tar', 'x', '-C', folder], input=packed.stdout, check=True)
        yield Path(folder)


def film(folder, size):
    "A painted clip on disk: 200 frames, four fifths to learn from."
    from spatialavatar0.pictures.clips import write_vhap
    from spatialavatar0.pictures.people import make_person, mono_clip

    write_vhap(mono_clip(make_person(3), 200, size), folder)


def compare(folder, size, threads, names, before, given):
    "Milliseconds per step, before and now, of one size and number of threads."
    versions = {('before', 'default'): before} | {('now', name): HERE.parents[1] for name in names}
    with contextlib.ExitStack() as stack:
        asks = {}
        for (when, name), source in versions.items():
            begun = stack.enter_context(worker(source, folder, size, name, threads))
            asks[when, name] = begun[1]
        for ask in asks.values():
            ask(given.steps)  # compiles, fills the caches
        clock = 'cpu' if threads == 1 else 'wall'
        times = {key: [] for key in asks}
        for _ in range(given.blocks):
            for key, ask in asks.items():
                times[key].append(1e3 * ask(given.steps)[clock] / given.steps)
    return dict(gaussians=begun[0]['gaussians'], clock=clock), times


def told(size, threads, about, times):
    "Print a size's lines; -> what is kept of them."
    old = min(times['before', 'default'])
    print(
        f'\n{size} x {size}, {about["gaussians"]:,} Gaussians, {threads} threads, {about["clock"]}'
    )
    found = dict(about)
    for (when, name), taken in times.items():
        best = min(taken)
        pairs = [a / b for a, b in zip(times['before', 'default'], taken)]
        middle = sorted(pairs)[len(pairs) // 2]
        print(
            f'{when:8}{name:10}{best:8.1f} ms a step{old / best:8.2f} x (of pairs {middle:.2f} x)'
        )
        found[f'{when} {name}'] = dict(ms=round(best, 2), gain=round(old / best, 3))
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--before', help='a commit of this repository')
    parser.add_argument('--sizes', default='256,512')
    parser.add_argument('--threads', default='1,2')
    parser.add_argument('--configs', default='default,fast')
    parser.add_argument('--blocks', type=int, default=8)
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--out', default='results/turns.json')
    parser.add_argument('--child', nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        folder, size, name, threads = given.child
        return work(folder, int(size), name, int(threads))
    found = dict(machine=common.machine(), before=given.before, torch=torch.__version__)
    with checkout(given.before) as before:
        for size in map(int, given.sizes.split(',')):
            with tempfile.TemporaryDirectory() as folder:
                film(folder, size)
                for threads in map(int, given.threads.split(',')):
                    names = given.configs.split(',')
                    about, times = compare(folder, size, threads, names, before, given)
                    found[f'{size} {threads}'] = told(size, threads, about, times)
                    common.save(given.out, found)


if __name__ == '__main__':
    main()
