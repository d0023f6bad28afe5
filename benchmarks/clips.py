"""How fast a long clip opens, how much memory that takes, and whether it streams: 2,000 frames in
each of the five formats.

    python benchmarks/clips.py [--frames 2000] [--size 512] [--out results/clips.json]

VHAP frames are written at full size by the kit; the other four by the tests' hand-made writers, at
80 x 60. Each folder is opened in a process of its own: seconds and growth of its memory until
`load_clip` returns, then frames per second and the peak while all are read.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import common  # first: waiting threads shall sleep

from spatialavatar0.pictures.clips import Clip, write_vhap
from spatialavatar0.pictures.people import make_person, mono_clip

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests'))

FORMATS = 'vhap', 'imavatar', 'insta', 'flashavatar', 'gagavatar'

WATCH = """
import json, re, sys, time, warnings
warnings.simplefilter('ignore')
import spatialavatar0.pictures.formats as formats
from spatialavatar0.head.head import open_head

def megabytes():
    status = open('/proc/self/status').read()
    return int(re.search(r'VmRSS:\\s+(\\d+)', status)[1]) / 1e3

formats.load_clip
open_head()
before = megabytes()
start = time.perf_counter()
clip = formats.load_clip(sys.argv[1], format=sys.argv[2])
opened = time.perf_counter() - start
held = megabytes() - before
peak = 0
start = time.perf_counter()
for i, frame in enumerate(clip):
    if i % 20 == 0:
        peak = max(peak, megabytes() - before)
rate = round(len(clip) / (time.perf_counter() - start))
peak = round(max(peak, megabytes() - before))
print(json.dumps(dict(
    frames=len(clip), open_s=round(opened, 2), open_mb=round(held), frames_per_s=rate, peak_mb=peak
)))
"""


def watched(folder, format):
    "What it costs to open and to read a folder, in a process of its own."
    done = subprocess.run(
        [sys.executable, '-c', WATCH, str(folder), format],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ, OMP_NUM_THREADS='2'),
    )
    return json.loads(done.stdout.splitlines()[-1])


def write_all(home, frames, size):
    "One folder of each format."
    import test_formats  # hand-made folders of the foreign formats

    few = mono_clip(make_person(3), 20, size).frames
    long = Clip(lambda i: replace(few[i % 20], time=i), frames)
    write_vhap(long, home / 'vhap')
    for name in FORMATS[1:]:
        if name != 'flashavatar':
            (home / name).mkdir()
        test_formats.MAKE[name](home / name, T=frames)


def options():
    "What the command line asks for."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--frames', type=int, default=2000)
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--out', default='results/clips.json')
    return parser.parse_args()


def main():
    given = options()
    rows = {}
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        write_all(home, given.frames, given.size)
        print(f'{"format":12}{"frames":>8}{"opens, s":>10}{"MB":>6}{"frames/s":>10}{"peak MB":>9}')
        for name in FORMATS:
            row = rows[name] = watched(home / name, name)
            opened = f'{row["frames"]:8}{row["open_s"]:10.2f}{row["open_mb"]:6}'
            read = f'{row["frames_per_s"]:10}{row["peak_mb"]:9}'
            print(f'{name:12}{opened}{read}', flush=True)
    common.save(given.out, dict(size=given.size, formats=rows, machine=common.machine()))


if __name__ == '__main__':
    main()
