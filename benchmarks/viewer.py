"""How quick the notebook's panel and the browser page are, and whether the page shows what our
renderer shows.

    python benchmarks/viewer.py [--resolution 128] [--size 256] [--threads 2]
                                [--out results/viewer.json]

Panel: from a slider's new value to the JPEG in the widget, the median of 30 moves, per kind of
picture. Page: its own work per frame (skinning, binding, sorting) in headless Chromium, the median
over 120 poses, and PSNR on the head against our renderer at the same poses and cameras. Drawing is
the graphics card's part: a browser without one draws in software, and that is not counted.
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
    page_picture,
    view_of,
    write_page,
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
    explorer = Explorer(avatar, size)
    explorer.draw_when_still = lambda: None  # the picture of the moving slider alone
    explorer.quick_size = lambda: size  # in full size
    medians = {}
    for show in SHOW:
        explorer.show.value = show
        took = []
        for i in range(32):
            start = time.perf_counter()
            explorer.sliders['jawOpen'].value = (i + 1) / 40
            took.append(1e3 * (time.perf_counter() - start))
        medians[show] = round(statistics.median(took[2:]), 1)
    return medians


def agreement(avatar, tab, home, values, size):
    "Decibels on the head between the page in a browser tab and our renderer, at one pose."
    viewmat, K = view_of(home, values, size, size)
    pose = pose_of(avatar.head, values)
    with torch.no_grad():
        rgb, alpha = avatar.render(viewmat, K, size, size, background=1.0, **pose)
    moves = {name: value for name, value in values.items() if name not in VIEW}
    theirs = page_picture(tab, viewmat, K, size, size, moves)
    return round(float(psnr(rgb.clamp(0, 1), theirs, (alpha > 0.5).float())), 1)


def browser(avatar, file, size):
    "Milliseconds of the page's work, and decibels against ours."
    home = home_view(avatar)
    dB = {}

    def visit(tab):
        for name, values in POSES.items():
            dB[name] = agreement(avatar, tab, home, values, size)
        tab.evaluate('avatar.camera(); avatar.reset()')
        return tab.evaluate('avatar.measure(120)')

    ms = in_browser(file, visit)
    return {part: round(ms[part], 2) for part in ('skin', 'bind', 'sort', 'work')}, dB


def page_numbers(avatar, size):
    "Megabytes, milliseconds and decibels of the page for browsers."
    with tempfile.TemporaryDirectory() as folder:
        file = write_page(avatar, Path(folder) / 'head.html')
        megabytes = round(file.stat().st_size / 1e6, 2)
        ms, dB = browser(avatar, file, size)
    print(f'page of {megabytes} MB, ms per frame: {listed(ms)}; dB on the head: {listed(dB)}')
    return dict(page_mb=megabytes, page_ms=ms, page_dB=dB)


def listed(numbers):
    "A dict as one line of text."
    return ', '.join(f'{name} {value}' for name, value in numbers.items())


def options():
    "What the command line asks for."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(resolution=128, size=256, threads=2).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--out', default='results/viewer.json')
    return parser.parse_args()


def main():
    given = options()
    size = given.size
    common.set_threads(given.threads)
    picture = paint(make_person(12), *portrait_camera(open_head(), 256), 256)
    avatar = from_frame(picture, given.resolution)
    ms = panel(avatar, size)
    result = dict(gaussians=len(avatar), size=size, panel_ms=ms, machine=common.machine())
    print(f'{len(avatar):,} Gaussians; slider to picture at {size} x {size}, ms: {listed(ms)}')
    if find_browser():
        result |= page_numbers(avatar, size)
    else:
        print(
            'no browser here (apt-get install chromium; pip install playwright): the page was '
            'not measured'
        )
    common.save(given.out, result)


if __name__ == '__main__':
    main()
