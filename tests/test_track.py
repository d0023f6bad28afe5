"""Tracking a photo: bad input, the solver against known truth, the astronaut's thresholds."""

import builtins
import math
import struct
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from spatialavatar0.capture import landmarks, matte, track
from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import axis_angle_to_mat, orbit
from spatialavatar0.head.head import open_head

needs_mediapipe = pytest.mark.skipif(
    find_spec('mediapipe') is None, reason='needs the extra `track`'
)
PHOTO = skimage.data.astronaut()


@pytest.fixture(scope='module')
def head():
    return open_head()


@pytest.fixture(scope='module')
def table(head):
    return landmarks.landmark_table(head)


@pytest.fixture(scope='module')
def small(head, table):
    return landmarks.landmark_model(head, table)


@pytest.fixture(scope='module')
def seen():
    return landmarks.find_face(PHOTO)


@pytest.fixture(scope='module')
def frame(head, seen):
    return track.fit(PHOTO, head, seen)


K = track.camera_guess(512, 512)
FIFTHS = torch.arange(0, 478, 5)


def random_state(g, R, t):
    face = torch.cat([torch.randn(50, generator=g), torch.rand(52, generator=g)])
    return track.State(R, t, face.double())


def degrees_between(A, B):
    return math.degrees(math.acos(min(1.0, ((A @ B.T).trace().item() - 1) / 2)))


# ---------------------------------------------------------------- the door
def test_bad_files(tmp_path):
    def refused(path, match):
        with pytest.raises(InputError, match=match):
            landmarks.load_photo(path)

    def made(name, data):
        p = tmp_path / name
        p.write_bytes(data)
        return p

    refused(tmp_path / 'gone.png', 'no such file')
    refused(tmp_path, 'folder')
    refused(made('letter.png', b'Dear friend,'), 'not a picture')
    refused(made('empty.jpg', b''), 'not a picture')
    Image.fromarray(PHOTO).save(tmp_path / 'whole.jpg')
    Image.fromarray(PHOTO[:16, :16]).save(tmp_path / 'tiny.png')
    Image.fromarray(PHOTO[:70]).resize((20000, 64)).save(tmp_path / 'strip.png')
    refused(made('cut.jpg', (tmp_path / 'whole.jpg').read_bytes()[:9000]), 'cut short')
    refused(tmp_path / 'tiny.png', 'at least 64 pixels')
    refused(tmp_path / 'strip.png', 'long and thin')


def test_bombs_are_refused_before_they_are_decoded(tmp_path):
    def chunk(kind, data):
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 60000, 60000, 8, 2, 0, 0, 0))
    (tmp_path / 'bomb.png').write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + header
        + chunk(b'IDAT', zlib.compress(b'\0' * 100))
        + chunk(b'IEND', b'')
    )
    with pytest.raises(InputError, match='too many pixels'):
        landmarks.load_photo(tmp_path / 'bomb.png')


@pytest.mark.parametrize(
    'photo,match',
    [
        (PHOTO.astype(float), 'divide bytes by 255'),
        (np.full((64, 64, 3), np.nan), '0..1'),
        (PHOTO[..., :2], r'\(H,W,3\)'),
        (PHOTO[:20], 'at least 64'),
        (None, r'\(H,W,3\)'),
    ],
)
def test_bad_arrays(photo, match):
    with pytest.raises(InputError, match=match):
        landmarks.load_photo(photo)


def test_every_kind_of_picture_is_the_same_picture(tmp_path):
    want = landmarks.load_photo(PHOTO)
    im = Image.fromarray(PHOTO)
    im.save(tmp_path / 'a.png')
    im.save(tmp_path / 'a.webp', lossless=True)
    im.save(tmp_path / 'a.tif')
    im.save(tmp_path / 'a.gif', save_all=True, append_images=[im.rotate(90)])
    im.quantize(256).save(tmp_path / 'p.png')
    im.convert('CMYK').save(tmp_path / 'c.jpg', quality=95)
    for name in ('a.png', 'a.webp', 'a.tif', 'a.gif', 'p.png', 'c.jpg'):
        got = landmarks.load_photo(tmp_path / name)
        assert got.shape == want.shape and (got - want).abs().mean() < 0.02, name
    for a in (PHOTO.astype(np.uint16) * 257, PHOTO / 255.0, torch.tensor(PHOTO)):
        assert (landmarks.load_photo(a) - want).abs().max() < 1e-6
    Image.fromarray(PHOTO[..., 0].astype(np.uint16) * 257).save(tmp_path / 'deep.png')
    assert (landmarks.load_photo(tmp_path / 'deep.png') - want[..., :1]).abs().max() < 1e-5


@pytest.mark.parametrize('tag,turns', [(3, 2), (6, 1), (8, 3)])
def test_exif_rotation(tmp_path, tag, turns):
    exif = Image.Exif()
    exif[274] = tag
    Image.fromarray(np.rot90(PHOTO, turns).copy()).save(tmp_path / 'r.jpg', exif=exif, quality=95)
    assert (
        landmarks.load_photo(tmp_path / 'r.jpg') - landmarks.load_photo(PHOTO)
    ).abs().mean() < 0.01


def test_large_photos_shrink_and_transparent_ones_turn_white(tmp_path):
    Image.fromarray(PHOTO).resize((5000, 4000)).save(tmp_path / 'large.jpg')
    assert landmarks.load_photo(tmp_path / 'large.jpg').shape == (1638, 2048, 3)
    clear = np.dstack([PHOTO, np.full((512, 512), 255, np.uint8)])
    assert landmarks.load_photo(clear, alpha=True)[1] is None  # all opaque says nothing
    clear[:100, :, 3] = 0
    image, alpha = landmarks.load_photo(clear, alpha=True)
    assert image[:100].min() == 1
    assert alpha[:100].max() == 0
    assert alpha[100:].min() == 1


# ---------------------------------------------------------------- what may be missing
def test_without_mediapipe(monkeypatch):
    real = builtins.__import__

    def no_mediapipe(name, *a, **k):
        if name.split('.')[0] == 'mediapipe':
            raise ModuleNotFoundError("No module named 'mediapipe'")
        return real(name, *a, **k)

    monkeypatch.setattr(builtins, '__import__', no_mediapipe)
    with pytest.raises(InputError, match=r'pip install "spatialavatar0\[track\]"'):
        landmarks.find_face(PHOTO)


@needs_mediapipe
def test_without_system_library_or_model(monkeypatch, tmp_path):
    with pytest.raises(InputError, match='no such file'):
        landmarks.find_face(PHOTO, model=tmp_path / 'gone.task')
    (tmp_path / 'bad.task').write_bytes(b'not a model')
    with pytest.raises(InputError, match='fetch it again'):
        landmarks.find_face(PHOTO, model=tmp_path / 'bad.task')
    from mediapipe.tasks.python import vision

    def no_library(*_):
        raise OSError('libEGL.so.1: cannot open shared object file: No such file or directory')

    monkeypatch.setattr(vision.FaceLandmarker, 'create_from_options', no_library)
    (tmp_path / 'any.task').write_bytes(b'')
    with pytest.raises(InputError, match='apt-get install libegl1 libgles2'):
        landmarks.find_face(PHOTO, model=tmp_path / 'any.task')


# ---------------------------------------------------------------- detection
@needs_mediapipe
def test_none_two_and_a_small_second_face(seen):
    with pytest.raises(InputError, match='found none'):
        landmarks.find_face(skimage.data.coffee())
    with pytest.raises(InputError, match='found none'):
        landmarks.find_face(skimage.data.cat())
    with pytest.raises(InputError, match='crop it to one person'):
        landmarks.find_face(np.concatenate([PHOTO, PHOTO[:, ::-1]], 1))
    scene = np.full((900, 900, 3), 150, np.uint8)
    face = Image.fromarray(PHOTO[30:216, 130:316])
    scene[:700, :700] = np.asarray(face.resize((700, 700)))
    scene[640:, 640:] = np.asarray(face.resize((260, 260)))  # a bystander, 37% of the size
    with pytest.warns(UserWarning, match='the largest one is used'):
        found = landmarks.find_face(scene)
    assert found.span > 250


@needs_mediapipe
def test_small_faces_are_found(seen):
    far = np.full((1024, 1024, 3), 128, np.uint8)
    far[700:956, 700:956] = np.asarray(
        Image.fromarray(PHOTO).resize((256, 256), Image.Resampling.BOX)
    )
    assert (landmarks.find_face(far).lmks - seen.lmks / 2 - 700).norm(dim=1).mean() < 1


@needs_mediapipe
def test_detection_is_quiet_and_complete(capfd, head, seen):
    landmarks.find_face(PHOTO)
    out = capfd.readouterr()
    assert out.out == '' and out.err == ''
    assert seen.lmks.shape == (478, 2)
    assert set(seen.scores) == set(head.arkit_names)


# ---------------------------------------------------------------- the solver
def test_landmark_model_is_the_whole_head(head, table, small):
    g = torch.Generator().manual_seed(0)
    state = random_state(g, torch.eye(3).double(), torch.zeros(3).double())
    frame = track.to_frame(state, torch.zeros(64, 64, 3), K, head)
    corners = head(**frame.params)[0][head.faces[table.face_ids]]
    points = (corners * table.bary[..., None]).sum(1)
    assert (small(state.c) - points).abs().max() < 1e-6


def test_gradients(small):
    g = torch.Generator().manual_seed(1)
    shift = torch.tensor([0.01, 0.02, 1.0]).double()
    state = random_state(g, orbit(20, 10)[:3, :3].double(), shift)
    _, jacobian = track.pixels(small, state, K, grad=True)
    for k in (0, 1, 2, 3, 5, 6, 30, 55, 60, 66, 80, 107):
        step = torch.zeros(108).double()
        step[k] = 1e-6
        ahead, behind = (track.pixels(small, state.moved(e), K) for e in (step, -step))
        numeric = (ahead - behind) / 2e-6
        most = max(1, jacobian[..., k].abs().max().item())
        assert (numeric - jacobian[..., k]).abs().max() < 1e-4 * most


def test_recovers_a_known_person(head, table, small):
    for seed, yaw in ((0, 0), (1, 30), (2, -45)):
        g = torch.Generator().manual_seed(seed)
        view = orbit(yaw, 5, 1.4).double()
        true = random_state(g, view[:3, :3], view[:3, 3])
        weights = dict(zip(head.arkit_names, true.c[50:].tolist()))
        exact = landmarks.Detection(track.pixels(small, true, K).float(), weights)
        problem = track.set_up(small, table, exact, K, head.arkit_names, shape_sigma=10.0)
        found = track.solve(small, table, *problem)
        assert degrees_between(found.R, true.R) < 0.6
        metres = (small(found.c) - small(true.c))[table.valid].norm(dim=1)
        misses = (track.pixels(small, found, K) - exact.lmks)[table.valid].norm(dim=1)
        assert metres.mean() < 0.001
        assert misses.mean() < 0.1


def test_table_of_another_head_is_refused(head, table):
    class Other:
        faces = head.faces[:100]

    with pytest.raises(ValueError, match='other triangles'):
        landmarks.landmark_table(Other())


# ---------------------------------------------------------------- the astronaut
@needs_mediapipe
def test_astronaut_error(frame, seen, head):
    report = landmarks.fit_report(frame, seen, head)
    assert report['mean'] <= 1.5 and report['p95'] <= 3.5, report
    blind = landmarks.fit_report(
        track.fit(PHOTO, head, seen, held_out=FIFTHS), seen, head, only=FIFTHS
    )
    assert blind['mean'] <= 1.5 and blind['p95'] <= 3.5, blind


@needs_mediapipe
def test_disturbed_starts_agree(head, table, small, seen):
    start, target = track.set_up(small, table, seen, K, head.arkit_names)
    best = track.solve(small, table, start, target)
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        turn = axis_angle_to_mat(0.4 * torch.randn(3, generator=g).double())
        shift = 1 + 0.2 * torch.randn(3, generator=g).double()
        off = random_state(g, turn @ start.R, start.t * shift)
        again = track.solve(small, table, off, target)
        assert 1000 * (small(again.c) - small(best.c)).norm(dim=1).mean() <= 0.3
        assert degrees_between(again.R, best.R) <= 0.3


@needs_mediapipe
def test_frame(frame, head):
    assert frame.image.shape == (512, 512, 3)
    assert frame.K[0, 0] == 1024
    assert torch.isfinite(frame.viewmat).all()
    assert {k: tuple(v.shape) for k, v in frame.params.items()} == dict(
        shape=(1, head.num_shape), expr=(1, head.num_expr), jaw=(1, 3), eyes=(1, 6)
    )
    assert 0 <= frame.params['expr'].min()
    assert frame.params['expr'].max() <= 1
    assert frame.params['shape'].abs().max() < 4


@needs_mediapipe
def test_same_answer_every_time(frame, head, seen):
    again = track.fit(PHOTO, head, seen)
    assert torch.equal(again.mask, frame.mask)
    assert torch.equal(again.viewmat, frame.viewmat)


@needs_mediapipe
def test_matte_keeps_hair_and_drops_suit(frame):
    def at(x, y):
        return frame.mask[y, x].item()

    # nose, hair above, hair at both sides
    assert min(at(224, 130), at(205, 40), at(168, 70), at(290, 90)) > 0.9
    # wall, collar, suit, wall
    assert max(at(330, 60), at(224, 215), at(150, 300), at(120, 120)) < 0.01
    assert 0.05 < frame.mask.mean() < 0.09


@needs_mediapipe
@pytest.mark.parametrize(
    'part',
    [np.s_[70:], np.s_[:, 190:], np.s_[:170], np.s_[75:175, 175:275], np.s_[20:190, 140:320]],
    ids=['top', 'left', 'bottom', 'all sides', 'tight'],
)
def test_heads_cut_by_the_border(part, head):
    d = landmarks.find_face(PHOTO[part])
    f = track.fit(PHOTO[part], head, d)
    assert landmarks.fit_report(f, d, head)['mean'] < 1.7
    inside = d.lmks[[1, 4, 6, 168, 13]].long()
    assert f.mask[inside[:, 1], inside[:, 0]].min() > 0.95
    assert torch.isfinite(f.mask).all()


@needs_mediapipe
def test_sizes_and_light(head):
    im = Image.fromarray(PHOTO)
    for other in (
        im.resize((128, 128)),
        im.resize((1500, 1500)),
        im.convert('L'),
        Image.fromarray((PHOTO * 0.3).astype(np.uint8)),
        im.rotate(25),
    ):
        a = np.asarray(other)
        d = landmarks.find_face(a)
        f = track.fit(a, head, d)
        assert landmarks.fit_report(f, d, head)['mean'] < 1.7
        assert f.mask.shape == a.shape[:2]


@needs_mediapipe
def test_alpha_limits_the_matte(head, seen, frame):
    rgba = np.dstack([PHOTO, np.full((512, 512), 255, np.uint8)])
    rgba[:, :224, 3] = 0
    assert track.fit(rgba, head, seen).mask[:, :224].max() == 0


@needs_mediapipe
def test_matte_outside_the_picture(frame, head):
    from dataclasses import replace

    away = frame.viewmat.clone()
    away[0, 3] += 3
    with pytest.raises(InputError, match='outside the picture'):
        matte.matte(frame.image, replace(frame, viewmat=away), head)
