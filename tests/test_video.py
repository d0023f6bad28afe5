"""Films: awkward files, one clear line each; killed at any time; a likeness and its command."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch

from spatialavatar0 import cli
from spatialavatar0.capture.film import (
    LIMITS,
    Verdict,
    count_reasons,
    farthest_points,
    still_camera,
    track_video,
    verdicts,
    windows,
)
from spatialavatar0.capture.footage import ROW, film_pictures, open_film, stretches
from spatialavatar0.ground.core import InputError, to_uint8
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.clips import read_vhap
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.pipeline import FILES

needs_mediapipe = pytest.mark.skipif(
    find_spec('mediapipe') is None, reason='needs the extra `track`'
)
QUIET = dict(size=96, say=lambda _: None)


def ffmpeg(*words):
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), '-y', '-v', 'error', *map(str, words)], check=True
    )


def write(path, pictures, fps=25):
    imageio.mimwrite(path, pictures, fps=fps, quality=8, macro_block_size=1)
    return path


@pytest.fixture(scope='module')
def acted():
    return [
        to_uint8(f.image)
        for f in mono_clip(make_person(3), 40, 224, seed=1, yaw=20.0, background=0.7)
    ]


@pytest.fixture(scope='module')
def films(tmp_path_factory, acted):
    d = tmp_path_factory.mktemp('films')
    a = write(d / 'plain.mp4', acted)
    other = mono_clip(make_person(20), 20, 224, seed=2, background=0.2)
    b = [to_uint8(frame.image) for frame in other]
    ffmpeg('-display_rotation', 90, '-i', a, '-c', 'copy', d / 'sideways.mp4')
    ffmpeg('-i', a, '-vf', 'select=lt(mod(n\\,5)\\,3)', '-fps_mode', 'vfr', d / 'uneven.mp4')
    large = 'scale=3840:2160:force_original_aspect_ratio=decrease,pad=3840:2160:-1:-1'
    ffmpeg('-i', a, '-vf', large, '-frames:v', 12, '-preset', 'ultrafast', d / '4k.mp4')
    ffmpeg('-f', 'lavfi', '-i', 'sine=d=1', d / 'sound.mp3')
    write(d / 'two.mp4', [np.concatenate([x, y], 1) for x, y in zip(acted, b * 2)])
    write(d / 'cut.mp4', acted[:20] + b)
    write(d / 'nobody.mp4', [np.full((128, 128, 3), 10 * i, np.uint8) for i in range(12)])
    write(d / 'short.mp4', acted[:4])
    write(d / 'brief.mp4', acted[:16])
    (d / 'torn.mp4').write_bytes(a.read_bytes()[:4000])
    (d / 'empty.mp4').write_bytes(b'')
    (d / 'text.mp4').write_text('<!DOCTYPE html>')
    write(d / 'stamp.mp4', [np.zeros((32, 32, 3), np.uint8)] * 9)
    (d / 'folder').mkdir()
    return d


# what is in a file


def test_upright_even_and_not_too_large(films):
    def shapes(name, **options):
        return [picture.shape for picture in film_pictures(open_film(films / name, **options))]

    def first(name):
        return next(film_pictures(open_film(films / name)))

    assert shapes('plain.mp4') == [(224, 224, 3)] * 40
    assert len(shapes('plain.mp4', most=10.0)) in (16, 17)
    assert set(shapes('4k.mp4')) == {(1152, 2048, 3)}
    turned = np.rot90(first('sideways.mp4'), -1).astype(float)
    assert np.abs(turned - first('plain.mp4')).mean() < 1
    even = open_film(films / 'uneven.mp4')
    assert 12 < even.fps < 20
    assert abs(len(shapes('uneven.mp4')) - even.about) <= 2


def test_folder_of_pictures(tmp_path, acted):
    for i in range(3):
        imageio.imwrite(tmp_path / f'{i}.png', acted[i])
    f = open_film(tmp_path)
    assert f.about == 3
    assert all(np.array_equal(a, b) for a, b in zip(film_pictures(f), acted))


BAD = {
    'sound.mp3': 'has sound but no pictures',
    'torn.mp4': 'is not a film',
    'empty.mp4': 'is not a film',
    'text.mp4': 'is not a film',
    'gone.mp4': 'no film at',
    'folder': 'the folder has none',
    'stamp.mp4': 'expected at least 64',
    'nobody.mp4': 'expected one face in the film; found none',
    'two.mp4': 'two people or more',
    'short.mp4': 'only 4 of 4 pictures can be used',
}


@needs_mediapipe
@pytest.mark.parametrize('name', BAD)
def test_one_clear_line(films, tmp_path, name, capfd):
    words = ['track', str(films / name), '--out', str(tmp_path / 'clip'), '--size', '96']
    assert cli.main(words) == 1
    said = capfd.readouterr().err.splitlines()
    lines = [line for line in said if not line.startswith('note: ')]
    assert len(lines) == 1 and lines[0].startswith('error: ') and BAD[name] in lines[0], lines
    assert not (tmp_path / 'clip').exists()


class Judge:
    "Who is darker than the other?"

    limit, name = 0.6, 'a test'

    def __call__(self, image):
        return dict(identity=10 * image[60:-60, 60:-60].mean((0, 1)))


@needs_mediapipe
def test_a_cut_to_somebody_else(films, tmp_path):
    with pytest.raises(InputError, match='on somebody else is in the picture'):
        track_video(films / 'cut.mp4', tmp_path / 'a', judge=Judge(), **QUIET)
    said = []
    track_video(films / 'cut.mp4', tmp_path / 'b', size=96, say=said.append)
    about = json.loads((tmp_path / 'b' / 'tracking.json').read_text())
    assert about['cuts'][0] == 20 and 'cuts:' in said[0]


# rows, stretches, verdicts


def test_stretches_are_runs():
    rng = np.random.default_rng(0)
    for _ in range(200):
        good = rng.random(20) < 0.8
        cuts = rng.random(20) < 0.1
        runs = stretches(good, cuts)
        assert sorted(i for run in runs for i in run) == list(np.flatnonzero(good))
        assert all((np.diff(run) == 1).all() and not cuts[run[1:]].any() for run in runs)
        for before, after in zip(runs, runs[1:]):
            gap = good[before[-1] + 1 : after[0]]
            assert after[0] > before[-1] + 1 or cuts[after[0]] or not gap.all()


def test_verdicts_name_the_worst():
    rows = np.zeros(4, ROW)
    rows['faces'] = 1, 1, 0, 2
    fine = dict(landmarks=1.0, covered=0.0, outside=0.0, turned=5.0)
    table = verdicts({0: fine, 1: dict(fine, turned=75.0, covered=0.13)}, rows)
    expected = [Verdict.USED, Verdict.TURNED, Verdict.NO_FACE, Verdict.SEVERAL_FACES]
    assert [picture.verdict for picture in table] == expected
    words = ['', 'turned 75, more than 60', 'no face', '2 faces']
    assert [picture.reason for picture in table] == words
    assert table[0].entry() == dict(time=0, use=True, confidence=0.75, reason='', **fine)
    assert count_reasons(table) == '1 turned, 1 no face, 1 several faces'
    assert {verdict.value for verdict in Verdict} > set(LIMITS)


def test_unlike_spreads():
    points = torch.tensor([[0.0, 0], [0.1, 0], [5, 0], [0, 5], [5, 5]])
    assert farthest_points(points, 3, 0) == [0, 4, 2]
    assert farthest_points(points, 9, 1)[0] == 1
    assert sorted(farthest_points(points, 9, 1)) == [0, 1, 2, 3, 4]
    assert farthest_points(points[:1].repeat(4, 1), 3, 2) == [2]


def test_windows_stay_inside():
    g = torch.Generator().manual_seed(0)
    for film_size in ((64, 48), (300, 200)):
        corner = torch.rand(30, 2, generator=g) * 200 - 50
        sides = 60 + 20 * torch.rand(30, 2, generator=g)
        window = windows(torch.cat([corner, corner + sides], 1), film_size)
        assert window.size[0] <= film_size[0]
        assert window.size[1] <= film_size[1]
        assert (window.corners >= 0).all()
        assert (window.corners + window.size <= film_size).all()


# killed, and the same command again


@needs_mediapipe
def test_killed_at_any_time(films, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    program = 'import sys; from spatialavatar0.cli import main; sys.exit(main())'
    film = str(films / 'brief.mp4')

    def run(out, seconds=None):
        "Whether the command came to its end before it was killed."
        words = ['track', film, '--out', str(out), '--size', '128']
        process = subprocess.Popen(
            [sys.executable, '-c', program, *words],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            _, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
        assert process.returncode == 0, err.decode()[-1500:]
        return True

    began = time.time()
    run(tmp_path / 'whole')
    whole = time.time() - began
    killed = 0
    for share in (0.7, 0.9):
        killed += not run(tmp_path / 'killed', share * whole)
    run(tmp_path / 'killed')
    assert killed
    a, b = (read_vhap(tmp_path / n) for n in ('whole', 'killed'))
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert torch.equal(x.image, y.image)
        assert torch.equal(x.mask, y.mask)
        assert all(torch.equal(x.params[k], y.params[k]) for k in x.params)
    assert not [p for p in tmp_path.iterdir() if 'tracking' in p.name]


@needs_mediapipe
def test_another_film_is_refused(films, tmp_path):
    track_video(films / 'brief.mp4', tmp_path / 'a', **QUIET)
    with pytest.raises(InputError, match='other work: the film, fps .* changed'):
        track_video(films / 'uneven.mp4', tmp_path / 'a', **QUIET)


# a head from a film


@needs_mediapipe
def test_build_from_a_film(films, tmp_path, capfd):
    out, film = tmp_path / 'me', str(films / 'plain.mp4')
    code = cli.main(['build', film, '--out', str(out), '--preset', 'tiny'])
    assert code == 0, capfd.readouterr().err
    metrics = json.loads((out / 'metrics.json').read_text())
    assert metrics['refined']['head_psnr'] > metrics['start']['head_psnr']
    assert set(FILES.values()) < {p.name for p in out.iterdir()}
    assert (out / 'clip' / 'tracking.json').is_file()
    words = ['build', film, str(films / 'cut.mp4'), '--out', str(tmp_path / 'two')]
    assert cli.main(words) == 2


def test_still_camera_keeps_every_pixel():
    from spatialavatar0.avatar.hair import unturned
    from spatialavatar0.ground.geometry import intrinsics, orbit, project
    from spatialavatar0.pictures.clips import Frame

    head = open_head()
    K = intrinsics(400, 128, 128)
    viewmat = orbit(30, -15, 0.8, (0.02, 0.03, 0))
    params = dict(
        shape=torch.randn(1, head.num_shape, generator=torch.Generator().manual_seed(1)),
        neck=torch.tensor([[0.1, -0.2, 0]]),
        jaw=torch.tensor([[0.2, 0, 0]]),
    )
    frame = Frame(torch.zeros(128, 128, 3), torch.zeros(128, 128), viewmat, K, params)
    still = still_camera(frame, orbit(0, 0, 1.0, (0, 0, 0)), head)

    def points(frame):
        return project(head(**frame.params)[0], frame.viewmat, K)[0]

    assert (points(still) - points(frame)).abs().max() < 2e-2
    assert set(still.params) >= {'rotation', 'translation'}
    back = unturned(still, head)
    skull = head.weights[:, 1] > 0.999
    assert (points(back) - points(frame))[skull].abs().max() < 2e-2
