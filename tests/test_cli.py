"The commands: what they promise when all is well, and one clear line when it is not."

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageOps

from spatialavatar0 import cli, pipeline
from spatialavatar0.capture import landmarks
from spatialavatar0.ground.core import InputError
from spatialavatar0.stage2.loop import NotFinite

ASTRONAUT = skimage.data.astronaut()


def run(capfd, *args):
    "Exit code, standard output and standard error of a command."
    code = cli.main([str(a) for a in args])
    said = capfd.readouterr()
    return code, said.out, said.err


def refused(capfd, *args, within=20):
    "A failed command's one line; exit code 1, no traceback, and soon."
    start = time.perf_counter()
    code, out, err = run(capfd, *args)
    assert (code, err.count('\n')) == (1, 1), (code, out, err)
    assert err.startswith('error: ')
    assert 'Traceback' not in out + err
    assert time.perf_counter() - start < within
    return err


def spatialavatar0(*args, **kwargs):
    "The command as a user starts it."
    code = 'import sys; from spatialavatar0.cli import main; sys.exit(main())'
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | kwargs.pop('env', {})
    return subprocess.Popen(
        [sys.executable, '-c', code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        **kwargs,
    )


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder with one good photo and many bad ones."
    d = tmp_path_factory.mktemp('photos')
    Image.fromarray(ASTRONAUT).save(d / 'good.png')
    Image.fromarray(ASTRONAUT[300:]).save(d / 'suit.png')
    Image.fromarray(np.concatenate([ASTRONAUT, ASTRONAUT], 1)).save(d / 'twins.png')
    Image.fromarray(ASTRONAUT[:16, :16]).save(d / 'stamp.png')
    (d / 'letter.png').write_text('Dear friend,\n')
    (d / 'empty.jpg').write_bytes(b'')
    Image.fromarray(ASTRONAUT).save(d / 'whole.jpg')
    (d / 'cut.jpg').write_bytes((d / 'whole.jpg').read_bytes()[:20_000])
    return d


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The results of a small build, and its numbers."
    d = tmp_path_factory.mktemp('built') / 'new' / 'folder'
    return d, pipeline.build_avatar(
        ASTRONAUT, d, pipeline.build_preset('tiny'), say=lambda text: None
    )


# ---- all is well


def test_every_file_is_there_and_readable(built):
    import imageio.v2 as imageio

    from spatialavatar0.avatar.avatar import Avatar
    from spatialavatar0.use.export import read_ply

    d, numbers = built
    assert sorted(p.name for p in d.iterdir()) == sorted(pipeline.FILES.values())
    avatar = Avatar.load(d / pipeline.FILES['avatar'])
    splats = read_ply(d / pipeline.FILES['splats'])
    assert len(avatar) == len(splats[0]) == numbers['gaussians'] > 1000
    assert avatar.info['config']['resolution'] == 64
    assert (d / pipeline.FILES['page']).read_text().startswith('<!')
    assert 5e5 < (d / pipeline.FILES['page']).stat().st_size < 8e6
    for name in ('tracking', 'sheet'):
        assert min(Image.open(d / pipeline.FILES[name]).convert('RGB').size) >= 400
    for name in ('turntable', 'speaking'):
        for kind, size in (('', 96), ('_gif', 64)):
            frames = np.asarray(imageio.mimread(d / pipeline.FILES[name + kind]), float)
            assert len(frames) == (6 if kind else 12)
            assert frames[0].shape[:2] == (size, size)
            assert np.abs(frames[0] - frames[len(frames) // 4]).mean() > 0.2  # it moves


def test_view(built, tmp_path, capfd):
    "The same page again from the avatar file; a wrong name or file is one line."
    d, _ = built
    avatar = d / pipeline.FILES['avatar']
    code, out, err = run(capfd, 'view', avatar, '--out', tmp_path / 'me.html')
    assert code == 0 and 'me.html' in out and (tmp_path / 'me.html').stat().st_size > 5e5, err
    assert '.html' in refused(capfd, 'view', avatar, '--out', tmp_path / 'me.txt')
    assert 'not a readable avatar' in refused(
        capfd, 'view', d / pipeline.FILES['sheet'], '--out', tmp_path / 'other.html'
    )


def test_numbers(built):
    d, numbers = built
    saved = json.loads((d / pipeline.FILES['metrics']).read_text())
    assert set(saved) == set(numbers)
    assert set(saved['landmarks_by_yaw']) == {'0', '-25', '25', '-45', '45'}
    assert saved['landmarks']['mean'] <= 1.5
    assert saved['landmarks']['p95'] <= 3.5
    assert saved['landmarks_held_out']['mean'] <= 1.5
    assert saved['landmarks_held_out']['p95'] <= 3.6
    assert saved['psnr_refined'] > saved['psnr_warped'] + 1
    assert saved['aspect_999'] <= 10
    assert 'contour' in saved['units']['landmarks_by_yaw']
    assert saved['seconds']['all'] >= saved['seconds']['build']


def test_quality():
    "What the page promises of the laptop's avatar: front, turned views, no needles."
    from spatialavatar0.head.head import open_head

    head, cfg = open_head(), pipeline.build_preset('laptop')
    frame, fits = pipeline.track_photo(ASTRONAUT, head)
    avatar, cut, quality = pipeline.avatar_from_frame(frame, head, cfg, say=lambda text: None)
    seen = pipeline.judge_turns(avatar, cut, cfg.film)
    yaw = seen['landmarks_by_yaw']
    assert quality['psnr_refined'] >= 29, quality
    assert seen['aspect_999'] <= 10, seen
    assert None not in yaw.values(), seen
    assert yaw['0'] <= 2, yaw
    assert max(yaw['-25'], yaw['25']) <= 3.5, yaw
    assert max(yaw['-45'], yaw['45']) <= 5, yaw


@pytest.fixture
def quick(monkeypatch):
    "Builds of a second: every preset is a very small one."
    coarse = dict(size=96, resolution=32, iters=4, film=64, seconds=0.1, gif=32)
    small = dataclasses.replace(pipeline.build_preset('tiny'), **coarse)

    def preset(name, seed, device):
        return dataclasses.replace(small, seed=seed)

    monkeypatch.setattr(pipeline, 'build_preset', preset)


def test_command_builds_and_says_where(photos, tmp_path, capfd, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(
        capfd, 'build', photos / 'good.png', '--out', 'here', '--preset', 'tiny', '--seed', 3
    )
    assert code == 0
    assert 'Traceback' not in err
    assert 'contact_sheet.png' in out
    assert str(tmp_path / 'here') in out
    assert json.loads((tmp_path / 'here/metrics.json').read_text())['config']['seed'] == 3


def test_several_photos(photos, tmp_path, capfd, quick):
    """The mirrored photo stands for a second one: it is fitted with the first, and says what it
    adds."""
    ImageOps.mirror(Image.open(photos / 'good.png').convert('RGB')).save(tmp_path / 'mirrored.png')
    code, out, err = run(
        capfd, 'build', photos / 'good.png', tmp_path / 'mirrored.png', '--out', tmp_path / 'out'
    )
    assert code == 0 and 'Traceback' not in err and 'of the head more' in out, err
    numbers = json.loads((tmp_path / 'out/metrics.json').read_text())
    assert len(numbers['added']) == 2
    assert numbers['added'][0] > 0.1
    assert 0 <= numbers['added'][1] < 0.2
    assert 'no such file' in refused(
        capfd, 'build', photos / 'good.png', tmp_path / 'nobody.png', '--out', tmp_path / 'out'
    )


def test_the_ruler_does_not_shrink(built):
    """A view's landmark error is divided by the unturned eye distance: a perfect detector that is 3
    pixels off reads the same at every yaw."""
    from spatialavatar0.avatar.avatar import Avatar

    d, _ = built
    avatar = Avatar.load(d / pipeline.FILES['avatar'])
    head = avatar.head
    frame, _ = pipeline.track_photo(ASTRONAUT, head)
    table = landmarks.landmark_table(head)

    def off_by_three(yaw):
        "A detector; the contour is far off, and does not count."
        camera = dict(viewmat=pipeline.swung(avatar, frame, yaw), K=pipeline.film_camera(frame, 64))
        right = landmarks.frame_landmarks(dataclasses.replace(frame, **camera), head, table)
        wrong = right + torch.tensor([3.0, 0]) + 1e3 * table.contour[:, None]
        return lambda image: landmarks.Detection(wrong, {})

    errors = []
    for yaw in (0, 45):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, 'find_face', off_by_three(yaw))
            errors.append(pipeline.turned_error(avatar, frame, yaw, 64))
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    assert errors[0] > 1


def test_doctor(capfd, monkeypatch):
    code, out, err = run(capfd, 'doctor')
    assert code == 0
    assert {'torch', 'mediapipe', 'face_landmarker', 'open_head', 'CUDA GPU'} <= {
        r[0] for r in cli.doctor()
    }
    assert 'torch' in out


def test_doctor_with_nothing(capfd, monkeypatch, tmp_path):
    import ctypes
    import importlib.metadata

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def no_library(name):
        raise OSError(name)

    (tmp_path / 'face_landmarker.task').write_bytes(b'damaged')
    monkeypatch.setenv('SPATIALAVATAR0_DATA', str(tmp_path))
    monkeypatch.setattr(importlib.metadata, 'version', absent)
    monkeypatch.setattr(ctypes, 'CDLL', no_library)
    rows = {w: (here, note) for w, here, note in cli.doctor()}
    code, out, _ = run(capfd, 'doctor')
    assert code == 0
    assert not rows['mediapipe'][0]
    assert '[track]' in rows['mediapipe'][1]
    assert not rows['face_landmarker'][0]
    assert 'delete it' in rows['face_landmarker'][1]
    if sys.platform == 'linux':
        assert not rows['system libraries'][0] and 'libegl1' in out


def test_assets(capfd):
    code, out, _ = run(capfd, 'assets')
    assert code == 0
    assert 'face_landmarker' in out
    assert 'flame2023' in out


# ---- called wrongly


def test_help_lists_the_commands(capfd):
    code, out, _ = run(capfd, '--help')
    assert code == 0
    listed = (
        'inspect demo build track view animate export refine evaluate benchmark train gpu-check '
        'doctor assets'
    )
    assert all(command in out for command in listed.split())
    for command in ('animate', 'export'):
        said = run(capfd, command, '--help')[1]
        assert all(option in said for option in ('--head', '--seed', '--device', '--seconds'))
    for command in ('demo', 'build'):
        code, out, _ = run(capfd, command, '--help')
        assert code == 0
        assert all(o in out for o in ('--out', '--preset', '--seed', '--device'))


@pytest.mark.parametrize(
    'args',
    [
        [],
        ['fly'],
        ['demo', '--fast'],
        ['build'],
        ['demo', '--preset', 'huge'],
        ['demo', '--device', 'tpu'],
        ['demo', '--seed', 'x'],
        ['demo', '--seed', '-1'],
        ['demo', '--out'],
        ['track', 'film.mp4', '--seed', '1'],  # tracking draws no random numbers
    ],
    ids=' '.join,
)
def test_wrong_usage(capfd, args):
    code, out, err = run(capfd, *args)
    assert code == 2
    assert 'Traceback' not in out + err
    assert not args or (err.startswith('usage: ') and err.count('\n') == 1)


def test_help_is_quick_and_light():
    "No deep-learning library is loaded to print a page of help."
    heavy = 'torch', 'matplotlib', 'mediapipe', 'numba', 'scipy', 'PIL', 'skimage', 'gsplat'
    code = (
        'import sys; from spatialavatar0.cli import main; code = main(["--help"])\n'
        f'sys.exit(code or ", ".join({set(heavy)} & set(sys.modules)) or 0)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- bad input


@pytest.mark.parametrize(
    'name, said',
    [
        ('suit.png', 'expected a face in the photo, found none'),
        ('twins.png', 'expected one face in the photo, found 2'),
        ('letter.png', 'letter.png is not a picture'),
        ('stamp.png', '16 x 16 pixels'),
        ('empty.jpg', 'not a picture'),
        ('cut.jpg', 'damaged or cut short'),
        ('nobody.jpg', 'no such file'),
        ('.', 'the folder'),
    ],
)
def test_bad_photo(photos, tmp_path, capfd, name, said):
    assert said in refused(capfd, 'build', photos / name, '--out', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_output_in_the_way(photos, tmp_path, capfd, monkeypatch):
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'out' / 'head.ply').mkdir(parents=True)
    before = sorted(tmp_path.rglob('*'))
    monkeypatch.setattr(
        pipeline,
        'find_face',
        lambda *a: pytest.fail('the output should be refused before any work'),
    )
    for out, said in (
        ('file', 'a file where a folder is needed'),
        ('file/deep', 'a file where a folder is needed'),
        ('out', 'a folder of that name'),
    ):
        assert said in refused(
            capfd, 'build', photos / 'good.png', '--out', tmp_path / out, within=5
        )
    assert sorted(tmp_path.rglob('*')) == before
    assert (tmp_path / 'file').read_text() == 'mine'


def test_output_without_permission(photos, tmp_path, capfd, monkeypatch):
    (tmp_path / 'locked').mkdir(mode=0o555)
    if os.access(tmp_path / 'locked', os.W_OK):  # root may write anywhere
        access = os.access
        monkeypatch.setattr(
            os,
            'access',
            lambda p, mode: access(p, mode) and not (str(p).endswith('locked') and mode & os.W_OK),
        )
    monkeypatch.setattr(
        pipeline,
        'find_face',
        lambda *a: pytest.fail('the output should be refused before any work'),
    )
    assert 'permission denied' in refused(
        capfd, 'build', photos / 'good.png', '--out', tmp_path / 'locked' / 'out', within=5
    )


def test_full_disk(photos, tmp_path, capfd, monkeypatch):
    def full(*a):
        raise OSError(28, 'No space left on device', str(tmp_path / 'out' / 'tracking.jpg'))

    monkeypatch.setattr(pipeline, '_save_overlay', full)
    assert 'No space left on device' in refused(
        capfd, 'build', photos / 'good.png', '--out', tmp_path / 'out'
    )


def test_photo_is_not_overwritten(tmp_path, capfd):
    Image.fromarray(ASTRONAUT).save(tmp_path / 'tracking.jpg')
    before = (tmp_path / 'tracking.jpg').read_bytes()
    assert 'is the photo itself' in refused(
        capfd, 'build', tmp_path / 'tracking.jpg', '--out', tmp_path
    )
    assert (tmp_path / 'tracking.jpg').read_bytes() == before


def test_no_gpu(tmp_path, capfd):
    import torch

    if torch.cuda.is_available():
        pytest.skip('this machine has a CUDA GPU')
    assert '--device cpu' in refused(capfd, 'demo', '--out', tmp_path / 'out', '--device', 'cuda')


# ---- something is missing


def test_no_model_and_no_network(tmp_path, capfd, monkeypatch):
    for k in list(os.environ):
        if k.upper().startswith('PIP_') or k.upper() == 'NO_PROXY':
            monkeypatch.delenv(k)
    for k in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.setenv(k, 'http://127.0.0.1:9')
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    monkeypatch.setenv('SPATIALAVATAR0_DATA', str(tmp_path / 'data'))
    said = refused(capfd, 'demo', '--out', tmp_path / 'out', within=45)
    assert 'face_landmarker' in said
    assert str(tmp_path / 'data') in said
    assert not (tmp_path / 'out').exists()


def test_damaged_model(tmp_path, capfd, monkeypatch):
    (tmp_path / 'face_landmarker.task').write_bytes(b'<html>')
    monkeypatch.setenv('SPATIALAVATAR0_DATA', str(tmp_path))
    assert 'face_landmarker' in refused(capfd, 'demo', '--out', tmp_path / 'out')


@pytest.mark.parametrize(
    'error, said',
    [
        (
            OSError('libGLESv2.so.2: cannot open shared object file'),
            'apt-get install libegl1 libgles2',
        ),
        (ModuleNotFoundError("No module named 'mediapipe'"), 'spatialavatar0[track]'),
    ],
)
def test_no_system_library_or_package(tmp_path, capfd, monkeypatch, error, said):
    "At the import ..."
    import builtins

    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split('.')[0] == 'mediapipe':
            raise error
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    assert said in refused(capfd, 'demo', '--out', tmp_path / 'out')


def test_no_system_library_when_started(tmp_path, capfd, monkeypatch):
    "... and when the landmarker starts, which is where newer versions load it."
    from mediapipe.tasks.python import vision

    def no_library(options):
        raise OSError('libEGL.so.1: cannot open shared object file')

    monkeypatch.setattr(vision.FaceLandmarker, 'create_from_options', no_library)
    assert 'apt-get install libegl1 libgles2' in refused(capfd, 'demo', '--out', tmp_path / 'out')


# ---- a corrupted avatar file


@pytest.mark.parametrize(
    'harm', ['cut short', 'empty', 'text', 'other tensors', 'flipped', 'a folder', 'missing']
)
def test_corrupted_avatar(built, tmp_path, harm):
    import torch
    from safetensors.torch import save_file

    from spatialavatar0.avatar.avatar import Avatar

    good = (built[0] / pipeline.FILES['avatar']).read_bytes()
    p = tmp_path / 'a.safetensors'
    if harm == 'other tensors':
        save_file(dict(x=torch.zeros(3)), p)
    elif harm == 'a folder':
        p.mkdir()
    elif harm != 'missing':
        p.write_bytes(
            {
                'cut short': good[: len(good) // 2],
                'empty': b'',
                'text': b'Dear friend,',
                'flipped': b'\xff' * 8 + good[8:],
            }[harm]
        )
    with pytest.raises(InputError, match='a.safetensors'):
        Avatar.load(p)


def test_numbers_that_break_are_one_line(tmp_path, capfd, monkeypatch):
    "A refinement that runs into infinities is not a bug: one line says where it broke."

    def breaks(*args):
        raise NotFinite('loss is not finite at step 0, frame 3')

    monkeypatch.setattr(pipeline, 'refine_clip', breaks)
    said = refused(capfd, 'refine', 'new', tmp_path, '--out', tmp_path / 'out')
    assert 'at step 0, frame 3' in said


def test_bug_keeps_its_traceback(monkeypatch):
    "Only a user's mistakes become one line; a bug of ours must stay visible."

    def bug():
        raise ZeroDivisionError

    monkeypatch.setattr(cli, 'doctor', bug)
    with pytest.raises(ZeroDivisionError):
        cli.main(['doctor'])


# ---- interrupted


def test_interrupted_while_writing(built, tmp_path, capfd, monkeypatch):
    "Ctrl-C in the middle of a file: the old one stays, the new one is gone."
    from matplotlib.figure import Figure

    (tmp_path / 'contact_sheet.png').write_text('earlier')
    (tmp_path / 'metrics.json').write_text('{"earlier": 1}')

    def half(figure, path, *args, **kwargs):
        path.write_bytes(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, 'savefig', half)
    code, out, err = run(capfd, 'demo', '--preset', 'tiny', '--out', tmp_path)
    assert code == 130
    assert err.strip().splitlines()[-1].startswith('interrupted')
    assert 'Traceback' not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'avatar.safetensors',
        'contact_sheet.png',
        'head.html',
        'head.ply',
        'tracking.jpg',
    ]
    assert (tmp_path / 'contact_sheet.png').read_text() == 'earlier'


def whole(folder):
    "Names in a folder, after opening each file that has a final name."
    import imageio.v2 as imageio

    from spatialavatar0.avatar.avatar import Avatar
    from spatialavatar0.use.export import read_ply

    names = {p.name for p in folder.iterdir() if not p.name.startswith('.')}
    assert names <= set(pipeline.FILES.values())
    for n in names:
        if n.endswith(('.jpg', '.png')):
            Image.open(folder / n).load()
        elif n.endswith(('.mp4', '.gif')):
            assert len(imageio.mimread(folder / n)) >= 6
        elif n.endswith('.json'):
            json.loads((folder / n).read_text())
        elif n.endswith('.html'):
            assert (folder / n).read_text().rstrip().endswith('</html>')
        else:
            Avatar.load(folder / n) if n.endswith('.safetensors') else read_ply(folder / n)
    return names


@pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')
@pytest.mark.parametrize(
    'kill, until', [(signal.SIGINT, 'tracking.jpg'), (signal.SIGKILL, '.turntable.*')]
)
def test_killed_demo(tmp_path, kill, until):
    job = spatialavatar0('demo', '--preset', 'tiny', '--out', tmp_path)
    start = time.perf_counter()
    while not any(tmp_path.glob(until)) and job.poll() is None and time.perf_counter() - start < 60:
        time.sleep(0.002)
    job.send_signal(kill)
    out, err = job.communicate(timeout=30)
    assert 'metrics.json' not in whole(tmp_path)
    assert 'Traceback' not in err
    if kill == signal.SIGINT:
        assert job.returncode == 130
        assert 'interrupted' in err
        assert not any(p.name.startswith('.') for p in tmp_path.iterdir())
    else:
        assert job.returncode == -signal.SIGKILL


# ---- moved, taken away


def test_animate(built, tmp_path, capfd):
    import imageio.v2 as imageio

    d, _ = built
    avatar = d / pipeline.FILES['avatar']
    (tmp_path / 'take.csv').write_text('JawOpen,HeadYaw\n0,0\n.5,.2\n0,0\n')
    short = ('--size', 64, '--seconds', 0.5, '--fps', 8)
    for motion, name in (('nod', 'a.mp4'), (tmp_path / 'take.csv', 'b.gif')):
        code, out, err = run(capfd, 'animate', avatar, motion, '--out', tmp_path / name, *short)
        assert code == 0 and name in out, err
        frames = imageio.mimread(tmp_path / name)
        assert len(frames) == (4 if motion == 'nod' else 3)
        assert frames[0].shape[:2] == (64, 64)
    for args, said in (
        (('dance',), 'talk, look, nod, blink'),
        (('nod', '--out', tmp_path / 'a.avi'), '.mp4 or .gif'),
        ((d / pipeline.FILES['sheet'],), 'two people or more'),
        ((tmp_path,), 'not a clip'),
        ((avatar,), 'not a film'),
    ):
        where = () if '--out' in args else ('--out', tmp_path / 'x.gif')
        assert said in refused(capfd, 'animate', avatar, *args, *where)
        assert not (tmp_path / 'x.gif').exists()


def test_drive_with_a_film(built, tmp_path, capfd):
    d, _ = built
    avatar = d / pipeline.FILES['avatar']
    import imageio.v2 as imageio

    face = np.asarray(Image.fromarray(ASTRONAUT).resize((256, 256)))
    imageio.mimwrite(
        tmp_path / 'me.mp4',
        [face, np.roll(face, 4, 1), np.zeros_like(face), np.roll(face, 8, 1)],
        fps=5,
        macro_block_size=1,
    )
    code, out, err = run(
        capfd, 'animate', avatar, tmp_path / 'me.mp4', '--out', tmp_path / 'a.gif', '--size', 48
    )
    assert code == 0
    assert '1 of 4 pictures show no face' in err
    assert len(imageio.mimread(tmp_path / 'a.gif')) == 4


def test_export(built, tmp_path, capfd):
    from spatialavatar0.use.export import read_splats
    from spatialavatar0.use.gaussian_avatars import read_gaussian_avatar
    from spatialavatar0.use.gltf import read_glb

    d, numbers = built
    avatar = d / pipeline.FILES['avatar']

    def do(*a):
        return run(capfd, 'export', avatar, *a)

    for name in ('a.ply', 'a.compressed.ply', 'a.splat', 'a.npz'):
        assert do(tmp_path / name)[0] == 0
        assert len(read_splats(tmp_path / name)[0]) > 0.9 * numbers['gaussians']
    assert do(tmp_path / 'a.glb')[0] == 0
    assert read_glb(tmp_path / 'a.glb')[0]['animations']
    assert do(tmp_path / 'a.html')[0] == 0
    look = ('--motion', 'look', '--seconds', 1)
    assert do(tmp_path / 'ga', '--gaussian-avatars', *look, '--fps', 5)[0] == 0
    assert len(read_gaussian_avatar(tmp_path / 'ga')[1]) == 5
    assert do(tmp_path / 'frames', *look, '--fps', 3, '--form', '.splat')[0] == 0
    assert len(list((tmp_path / 'frames').glob('*.splat'))) == 3
    for args, said in (
        ((tmp_path / 'a.obj',), 'should end in'),
        ((tmp_path / 'a.ply', '--motion', 'nod'), 'goes into a folder'),
        ((tmp_path / 'a.glb', '--motion', 'nod'), 'goes into a folder'),
        ((tmp_path, '--motion', 'nod'), 'other files'),
    ):
        assert said in refused(capfd, 'export', avatar, *args)


# ---- stage 2 on a folder of frames


@pytest.fixture
def clip(tmp_path):
    "A painted person's clip."
    from spatialavatar0.head.head import open_head
    from spatialavatar0.pictures.clips import write_vhap
    from spatialavatar0.pictures.people import make_person, mono_clip

    write_vhap(mono_clip(make_person(5), 12, 64), tmp_path / 'clip', open_head())
    return tmp_path / 'clip'


def test_refine_a_folder(clip, tmp_path, capfd):
    out, more = tmp_path / 'out', tmp_path / 'more'
    args = ('refine', 'new', clip, '--out', out, '--resolution', 32)
    code, said, err = run(capfd, *args, '--iters', 30)
    assert code == 0 and 'held out' in said, err
    first = (out / 'avatar.safetensors').read_bytes()
    assert run(capfd, *args, '--iters', 30)[0] == 0  # goes on from the end: nothing changes
    assert (out / 'avatar.safetensors').read_bytes() == first
    from_file = ('refine', out / 'avatar.safetensors', clip)
    assert run(capfd, *from_file, '--out', more, '--iters', 5)[0] == 0
    numbers = json.loads((out / 'metrics.json').read_text())
    assert numbers['refined']['psnr'] > numbers['start']['psnr']
    assert 'iters (was 30, now 31) changed' in refused(capfd, *args, '--iters', 31)


def test_refine_refuses(clip, tmp_path, capfd):
    (tmp_path / 'empty').mkdir()
    gone = tmp_path / 'gone.safetensors'
    x = ('--out', tmp_path / 'x')
    assert 'not a clip' in refused(capfd, 'refine', 'new', tmp_path / 'empty', *x)
    assert 'no avatar' in refused(capfd, 'refine', gone, clip, *x)
    assert '--device cpu' in refused(capfd, 'refine', 'new', clip, '--device', 'cuda')


# ---- stage 1


def test_evaluate_a_folder(built, tmp_path, capfd):
    from spatialavatar0.head.head import open_head
    from spatialavatar0.pictures.clips import write_vhap
    from spatialavatar0.pictures.people import make_person, mono_clip

    write_vhap(mono_clip(make_person(5), 8, 64), tmp_path / 'anna', open_head())
    out = tmp_path / 'r.jsonl'
    code, said, err = run(
        capfd, 'evaluate', 'warp', tmp_path / 'anna', '--protocol', 'uniform:4', '--out', out
    )
    assert code == 0 and '| warp |' in said, err
    line = json.loads(out.read_text())
    assert line['subject'] == 'anna'
    assert line['scores']['frames'] == 3
    assert line['split'] == dict(uniform=4)
    for args, words in (
        (('--protocol', 'uniform:4'), 'already'),
        (('--protocol', 'odd'), 'last:15'),
        ((), 'more than 350'),
        (('--protocol', 'vfhq_cross'), 'somebody else drives'),
    ):
        assert words in refused(capfd, 'evaluate', 'warp', tmp_path / 'anna', *args, '--out', out)
    assert len(out.read_text().splitlines()) == 1


def test_train(tmp_path, capfd):
    out = tmp_path / 'out'
    args = ('train', '--out', out, '--preset', 'tiny')
    ten, whom = ('--steps', 10), ('--people', 2, '--subjects', 1)
    code, said, err = run(capfd, *args, *ten, *whom)
    assert code == 0 and 'held-out mono' in said, err
    first = (out / 'generator.safetensors').read_bytes()
    code, said, err = run(capfd, *args, *ten, *whom)
    assert code == 0
    assert 'going on from step 10' in said
    assert (out / 'generator.safetensors').read_bytes() == first
    assert 'other work: steps of' in refused(capfd, *args, '--steps', 11, *whom)
    others = ('--people', 3, '--subjects', 1)
    assert 'the painted people changed' in refused(capfd, *args, *ten, *others)
