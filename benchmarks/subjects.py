"""Many people, one process each: how much faster two processes are than one, and what a person
costs.

    python benchmarks/subjects.py [--people 4] [--size 256] [--resolution 128] [--iters 600]
                                  [--out results/subjects.json]

Painted clips are written as VHAP folders, and `spatialavatar0 benchmark` runs over them, Stage 2 as
in the paper, with 1 and with 2 processes of one thread each, in turns. Then Stage 1 likewise:
torchrun launches one and two processes of the laptop preset, with the same global batch.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common  # first: waiting threads shall sleep

from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.clips import write_vhap
from spatialavatar0.pictures.people import make_person, mono_clip

STEP = """
import json, sys, torch
from accelerate import Accelerator
from spatialavatar0.pictures.domains import mono, people
from spatialavatar0.stage1.generator import from_preset
from spatialavatar0.stage1.schedule import laptop_schedule
from spatialavatar0.stage1.trainer import Shelf, Trainer

torch.set_num_threads(1)
me = Accelerator(cpu=True)
generator = from_preset('laptop', seed=0)
crowd = people(mono(generator.config.image_size), 8, seed=1)
with me.main_process_first():
    shelf = Shelf(crowd, generator, sys.argv[1])
trainer = Trainer(generator, laptop_schedule(30, 0, 4), [shelf], seed=0, accelerator=me)
trainer.run(5, show=False)
before = trainer.seconds
trainer.run(show=False)
if me.is_main_process:
    step_ms = round(1e3 * (trainer.seconds - before) / 25, 1)
    print(json.dumps(dict(processes=me.num_processes, step_ms=step_ms)))
"""


def environment():
    return dict(os.environ, OMP_NUM_THREADS='1', NUMBA_NUM_THREADS='1', ACCELERATE_USE_CPU='true')


def refined(folder, out, jobs, iters, resolution):
    "Seconds for all people, with so many processes."
    options = dict(
        protocol='last:10',
        method='warp+paper',
        iters=iters,
        resolution=resolution,
        jobs=jobs,
        out=out,
    )
    words = [str(word) for name, value in options.items() for word in (f'--{name}', value)]
    call = ['spatialavatar0', 'benchmark', str(folder), *words]
    start = time.perf_counter()
    subprocess.run(call, check=True, env=environment(), stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def trained(folder, processes):
    "Milliseconds of a step of Stage 1, batch 4 in all."
    script = Path(folder) / 'step.py'
    script.write_text(STEP)
    words = ['--nproc_per_node', str(processes), str(script), str(Path(folder) / 'looks')]
    call = [sys.executable, '-m', 'torch.distributed.run', *words]
    done = subprocess.run(call, check=True, env=environment(), capture_output=True, text=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found['processes'] == processes, found
    return found['step_ms']


def write_people(folder, given):
    "A painted clip of each person, as VHAP folders."
    for n in range(given.people):
        clip = mono_clip(make_person(n + 1), given.frames, given.size, seed=n)
        write_vhap(clip, folder / f'{n + 1:02}', open_head())


def measure(folder, given):
    "Seconds of Stage 2 and milliseconds of a step of Stage 1, by the number of processes."
    people = folder / 'people'
    write_people(people, given)
    refined(people, folder / 'warm', 2, 5, given.resolution)  # kernels compile once per machine

    def best_of_two(jobs):
        outs = [folder / f'{jobs}_{k}' for k in range(2)]
        return min(refined(people, out, jobs, given.iters, given.resolution) for out in outs)

    seconds = {jobs: best_of_two(jobs) for jobs in (1, 2)}
    step = {n: min(trained(folder, n) for _ in range(2)) for n in (1, 2)}
    return seconds, step


def options():
    "What the command line asks for."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = dict(people=4, size=256, resolution=128, iters=600, frames=60)
    for name, default in numbers.items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--out', default='results/subjects.json')
    return parser.parse_args()


def main():
    given = options()
    with tempfile.TemporaryDirectory() as folder:
        seconds, step = measure(Path(folder), given)

    def row(duration):
        an_hour = round(3600 * given.people / duration, 1)
        return dict(seconds=round(duration, 1), people_per_hour=an_hour)

    result = dict(
        settings={name: value for name, value in vars(given).items() if name != 'out'},
        refine={str(jobs): row(duration) for jobs, duration in seconds.items()},
        refine_gain=round(seconds[1] / seconds[2], 2),
        train={str(n): dict(step_ms=ms) for n, ms in step.items()},
        train_gain=round(step[1] / step[2], 2),
        machine=common.machine(),
    )
    common.save(given.out, result)
    shown = {name: value for name, value in result.items() if name != 'machine'}
    print(json.dumps(shown, indent=1))


if __name__ == '__main__':
    main()
