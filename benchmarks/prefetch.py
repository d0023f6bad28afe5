"""What a thread that makes the next pictures ahead gains where a clip does not fit into memory.

    python benchmarks/prefetch.py [--frames 120] [--size 256] [--steps 40] [--rounds 5]

A painted person is written to a folder of PNG files and refined from there with room for no
picture, so that every step reads one. Rounds without and with the thread take turns in one process;
a table holds the medians of their steps a second. On a GPU the processor is idle during a step;
here there is none. In the last row the steps are pauses of 12 ms, the paper's time on an RTX 3090:
it says what the thread hides when the processor has nothing else to do, and nothing of a GPU.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numba as nb
from common import machine, save  # first: waiting threads shall sleep

from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.pictures.clips import write_vhap
from spatialavatar0.pictures.formats import load_clip
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.stage2.loop import Refinement, calm, look
from spatialavatar0.stage2.refine import paper_config

ROOT = Path(__file__).resolve().parents[1]
PAUSE = 0.012  # seconds


def refinement(start, clip, ahead):
    "One without room; its ties are left out, so that it begins at once."
    run = Refinement(start, clip, paper_config(), 10**6, ahead=ahead)
    run.room = 0
    return run


def stepped(run):
    run.step()


def paused(run):
    "The picture of a step, and a pause."
    run._draw()
    run.step_number += 1
    time.sleep(PAUSE)


def rate(run, step, steps):
    "Steps a second of one round, its first left out."
    with calm(256 * 256), run._looking_ahead():
        step(run)
        begun = time.perf_counter()
        for _ in range(steps):
            step(run)
        return steps / (time.perf_counter() - begun)


def compared(start, clip, step, threads, options):
    "Rounds that take turns: median rates, and the median of the ratio."
    nb.set_num_threads(threads)
    runs = [refinement(start, clip, ahead) for ahead in (0, 4)]
    rounds = []
    for i in range(options.rounds + 1):
        rates = {run.ahead: rate(run, step, options.steps) for run in runs[:: 1 if i % 2 else -1]}
        rounds.append(rates)
    rounds = rounds[1:]  # the first compiles
    gains = [rates[4] / rates[0] for rates in rounds]
    return dict(
        alone=round(statistics.median(rates[0] for rates in rounds), 1),
        ahead=round(statistics.median(rates[4] for rates in rounds), 1),
        gain=round(statistics.median(gains), 2),
        gains=[round(gain, 2) for gain in sorted(gains)],
    )


def reading_ms(start, clip):
    "Milliseconds to read a picture and pose its mesh: the median."
    times = []
    for i in range(len(clip)):
        begun = time.perf_counter()
        look(start, clip[i])
        times.append(time.perf_counter() - begun)
    return round(1000 * statistics.median(times), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--frames', type=int, default=120)
    parser.add_argument('--size', type=int, default=256)
    parser.add_argument('--resolution', type=int, default=96)
    parser.add_argument('--steps', type=int, default=40)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--out', type=Path, default=ROOT / 'results' / 'prefetch.json')
    options = parser.parse_args()
    film = mono_clip(make_person(3), options.frames, options.size, seed=1)
    most = nb.config.NUMBA_NUM_THREADS
    kinds = {f'steps, threads: {n}': (stepped, n) for n in sorted({1, most})}
    kinds['pauses of 12 ms'] = paused, 1
    with tempfile.TemporaryDirectory() as folder:
        clip = load_clip(write_vhap(film, Path(folder) / 'clip'))
        start = from_frame(clip[0], options.resolution)
        reading = reading_ms(start, clip)
        print(f'{len(start):,} Gaussians, {options.size} px; {reading} ms to read and pose')
        print(f'{"":22}  alone   with a thread   gain')
        rows = {}
        for name, (step, threads) in kinds.items():
            rows[name] = row = compared(start, clip, step, threads, options)
            print(f'{name:22} {row["alone"]:6}   {row["ahead"]:13}   {row["gain"]:4}')
    size = dict(gaussians=len(start), size=options.size, frames=options.frames)
    size |= dict(steps=options.steps, rounds=options.rounds)
    save(options.out, dict(machine=machine(), **size, reading_ms=reading, rows=rows))


if __name__ == '__main__':
    main()
