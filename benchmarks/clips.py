"""How fast a long clip opens, how much memory that takes, and whether it streams: 2,000 frames in each of the five formats.

    python benchmarks/clips.py [--frames 2000] [--size 512] [--out results/clips.json]

VHAP frames are written at full size by the kit; the other four by the tests' hand-made writers, at 80 x 60. Each folder is opened in a
process of its own: seconds and growth of its memory until `load_clip` returns, then frames per second and the peak while all are read.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common  # first: waiting threads shall sleep
from spatialavatar0.pictures.clips import Clip, write_vhap
from spatialavatar0.pictures.people import make_person, mono_clip

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests'))

WATCH = """
import json, re, resource, sys, time, warnings
warnings.simplefilter('ignore')
import spatialavatar0.pictures.formats as f
from spatialavatar0.head.head import open_head
def now(): return int(re.search(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[1])/1e3
f.load_clip; open_head(); before = now(); start = time.perf_counter()
clip = f.load_clip(sys.argv[1], format=sys.argv[2]); opened = time.perf_counter()-start; held = now()-before; most = 0; start = time.perf_counter()
for i,frame in enumerate(clip): most = max(most, now()-before) if i%20==0 else most
print(json.dumps(dict(frames=len(clip), open_s=round(opened,2), open_mb=round(held), frames_per_s=round(len(clip)/(time.perf_counter()-start)), peak_mb=round(max(most,now()-before)))))
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


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(frames=2000, size=512).items():
        p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--out', default='results/clips.json')
    a = p.parse_args()
    out = {}
    import test_formats  # hand-made folders of the foreign formats

    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        few = mono_clip(make_person(3), 20, a.size).frames
        from dataclasses import replace

        write_vhap(Clip(lambda i: replace(few[i % 20], time=i), a.frames), home / 'vhap')
        for name in ('imavatar', 'insta', 'flashavatar', 'gagavatar'):
            if name != 'flashavatar':
                (home / name).mkdir()
            test_formats.MAKE[name](home / name, T=a.frames)
        print(f'{"format":12}{"frames":>8}{"opens, s":>10}{"MB":>6}{"frames/s":>10}{"peak MB":>9}')
        for name in ('vhap', 'imavatar', 'insta', 'flashavatar', 'gagavatar'):
            r = out[name] = watched(home / name, name)
            print(
                f'{name:12}{r["frames"]:8}{r["open_s"]:10.2f}{r["open_mb"]:6}{r["frames_per_s"]:10}{r["peak_mb"]:9}',
                flush=True,
            )
    common.save(a.out, dict(size=a.size, formats=out, machine=common.machine()))


if __name__ == '__main__':
    main()
