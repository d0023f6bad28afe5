"""Many people, one process each: how much faster two processes are than one, and what a person costs.

    python benchmarks/subjects.py [--people 4] [--size 256] [--resolution 128] [--iters 600] [--out results/subjects.json]

Painted clips are written as VHAP folders, and `spatialavatar0 benchmark` runs over them, Stage 2 as in the paper, with 1 and with 2
processes of one thread each, in turns. Then Stage 1 likewise: accelerate launches one and two processes of the laptop preset, with the same global batch.
"""

import argparse
import json
import os
import subprocess
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
from spatialavatar0.stage1.schedule import Shelf, Trainer, laptop_schedule
torch.set_num_threads(1); me = Accelerator(cpu=True); g = from_preset('laptop', seed=0); crowd = people(mono(g.config.image_size), 8, seed=1)
with me.main_process_first(): shelf = Shelf(crowd, g, sys.argv[1])
t = Trainer(g, laptop_schedule(30, 0, 4), [shelf], seed=0, accelerator=me); t.run(5, show=False); before = t.seconds; t.run(show=False)
if me.is_main_process: print(json.dumps(dict(step_ms=round(1e3*(t.seconds-before)/25,1))))
"""


def environment():
    return dict(os.environ, OMP_NUM_THREADS='1', NUMBA_NUM_THREADS='1', ACCELERATE_USE_CPU='true')


def refined(folder, out, jobs, a):
    "Seconds for all people, with so many processes."
    t = time.perf_counter()
    subprocess.run(
        [
            'spatialavatar0',
            'benchmark',
            str(folder),
            '--protocol',
            'last:10',
            '--method',
            'warp+paper',
            '--iters',
            str(a.iters),
            '--resolution',
            str(a.resolution),
            '--jobs',
            str(jobs),
            '--out',
            str(out),
        ],
        check=True,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - t


def trained(folder, processes):
    "Milliseconds of a step of Stage 1, batch 4 in all."
    script = Path(folder) / 'step.py'
    script.write_text(STEP)
    out = subprocess.run(
        [
            'accelerate',
            'launch',
            '--cpu',
            '--num_processes',
            str(processes),
            '--num_machines',
            '1',
            '--mixed_precision',
            'no',
            '--dynamo_backend',
            'no',
            str(script),
            str(Path(folder) / 'looks'),
        ],
        check=True,
        env=environment(),
        capture_output=True,
        text=True,
    ).stdout
    return json.loads(out.strip().splitlines()[-1])['step_ms']


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(people=4, size=256, resolution=128, iters=600, frames=60).items():
        p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--out', default='results/subjects.json')
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for n in range(a.people):
            write_vhap(
                mono_clip(make_person(n + 1), a.frames, a.size, seed=n),
                folder / 'people' / f'{n + 1:02}',
                open_head(),
            )
        refined(
            folder / 'people', folder / 'warm', 2, argparse.Namespace(**{**vars(a), 'iters': 5})
        )  # kernels are compiled once per machine
        seconds = {
            j: min(refined(folder / 'people', folder / f'{j}_{k}', j, a) for k in range(2))
            for j in (1, 2)
        }
        step = {n: min(trained(folder, n) for _ in range(2)) for n in (1, 2)}

    def row(s):
        return dict(seconds=round(s, 1), people_per_hour=round(3600 * a.people / s, 1))

    out = dict(
        settings={k: v for k, v in vars(a).items() if k != 'out'},
        refine={str(j): row(s) for j, s in seconds.items()},
        refine_gain=round(seconds[1] / seconds[2], 2),
        train={str(n): dict(step_ms=s) for n, s in step.items()},
        train_gain=round(step[1] / step[2], 2),
        machine=common.machine(),
    )
    common.save(a.out, out)
    print(json.dumps({k: v for k, v in out.items() if k != 'machine'}, indent=1))


if __name__ == '__main__':
    main()
