"""How quick the notebook's panel and the browser page are, and whether the page shows what our renderer shows.

    python benchmarks/viewer.py [--resolution 128] [--size 256] [--threads 2] [--out results/viewer.json]

Panel: from a slider's new value to the JPEG in the widget, the median of 30 moves, per kind of picture. Page: its own work per frame
(skinning, binding, sorting) in headless Chromium, the median over 120 poses, and PSNR on the head against our renderer at the same
poses and cameras. Drawing is the graphics card's part: a browser without one draws in software, and that is not counted.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import common  # first: waiting threads shall sleep
import torch

from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.metrics import psnr
from spatialavatar0.pictures.people import make_person, paint, portrait_camera
from spatialavatar0.use.animate import VIEW, pose_of
from spatialavatar0.use.viewer import (
    SHOW,
    Explorer,
    find_browser,
    home_view,
    in_browser,
    page,
    page_picture,
    view_of,
)

POSES = dict(
    neutral={},
    talking=dict(jawOpen=0.4, mouthSmileLeft=0.7, mouthSmileRight=0.7, neckYaw=12, eyesYaw=-10),
    side=dict(jawOpen=0.2, yaw=-50, pitch=10),
    back=dict(yaw=160),
    blink=dict(eyeBlinkLeft=1.0, eyeBlinkRight=1.0, neckPitch=10),
    close=dict(mouthPucker=0.8, zoom=2.5),
)


def panel(avatar, size):
    "Milliseconds from a slider to the picture, by what is shown."
    e, out = Explorer(avatar, size), {}
    e.settle = lambda: None  # the picture of the moving slider alone
    e.quick = lambda: size  # in full size
    for show in SHOW:
        e.show.value = show
        took = []
        for i in range(32):
            start = time.perf_counter()
            e.sliders['jawOpen'].value = (i + 1) / 40
            took.append(1e3 * (time.perf_counter() - start))
        out[show] = round(statistics.median(took[2:]), 1)
    return out


def browser(avatar, file, size):
    "Milliseconds of the page's work, and decibels against ours."
    home, dB = home_view(avatar), {}

    def visit(tab):
        for name, v in POSES.items():
            V, K = view_of(home, v, size, size)
            pose = pose_of(avatar.head, v)
            with torch.no_grad():
                rgb, alpha = avatar.render(V, K, size, size, background=1.0, **pose)
            theirs = page_picture(
                tab, V, K, size, size, {k: x for k, x in v.items() if k not in VIEW}
            )
            dB[name] = round(float(psnr(rgb.clamp(0, 1), theirs, (alpha > 0.5).float())), 1)
        tab.evaluate('avatar.camera(); avatar.reset()')
        return tab.evaluate('avatar.measure(120)')

    ms = in_browser(file, visit)
    return {k: round(ms[k], 2) for k in ('skin', 'bind', 'sort', 'work')}, dB


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(resolution=128, size=256, threads=2).items():
        p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--out', default='results/viewer.json')
    a = p.parse_args()
    common.set_threads(a.threads)
    avatar = from_frame(
        paint(make_person(12), *portrait_camera(open_head(), 256), 256), a.resolution
    )
    out = dict(
        gaussians=len(avatar), size=a.size, panel_ms=panel(avatar, a.size), machine=common.machine()
    )
    print(
        f'{len(avatar):,} Gaussians; slider to picture at {a.size} x {a.size}, ms: '
        + ', '.join(f'{k} {v}' for k, v in out['panel_ms'].items())
    )
    if find_browser():
        with tempfile.TemporaryDirectory() as folder:
            file = page(avatar, Path(folder) / 'head.html')
            out['page_mb'] = round(file.stat().st_size / 1e6, 2)
            out['page_ms'], out['page_dB'] = browser(avatar, file, a.size)
        print(
            f'page of {out["page_mb"]} MB, ms per frame: '
            + ', '.join(f'{k} {v}' for k, v in out['page_ms'].items())
            + '; dB on the head: '
            + ', '.join(f'{k} {v}' for k, v in out['page_dB'].items())
        )
    else:
        print(
            'no browser here (apt-get install chromium; pip install playwright): the page was '
            'not measured'
        )
    common.save(a.out, out)


if __name__ == '__main__':
    main()
