"""Synthetic people, and the table of MediaPipe's landmarks on the open head."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from spatialavatar0.ground.geometry import intrinsics, orbit
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures import people as synth


@pytest.fixture(scope='module')
def head():
    return open_head()


@pytest.fixture(scope='module')
def person(head):
    return synth.make_person(3, head)


@pytest.fixture(scope='module')
def table():
    from importlib.resources import files

    with np.load(files('spatialavatar0') / 'assets/open_landmarks.npz') as z:
        return dict(z)


def shot(person, head, yaw=0, size=128, **kw):
    return synth.paint(
        person,
        orbit(yaw, 0, 0.55, synth.face_centre(head)),
        intrinsics(1.95 * size, size, size),
        size,
        head=head,
        **kw,
    )


def test_same_seed_same_person(head, person):
    again = synth.make_person(3, head)
    other = synth.make_person(4, head)
    for name in ('shape', 'texture', 'static_offset'):
        assert torch.equal(getattr(person, name), getattr(again, name))
        assert not torch.equal(getattr(person, name), getattr(other, name))


def test_global_seed_is_not_touched(head):
    torch.manual_seed(0)
    a = torch.rand(3)
    torch.manual_seed(0)
    synth.make_person(5, head)
    assert torch.equal(torch.rand(3), a)


def test_texture_in_range(person, head):
    assert person.texture.shape == (256, 256, 3)
    assert 0 <= person.texture.min()
    assert person.texture.max() <= 1
    assert person.shape.shape == (1, head.num_shape)
    assert person.static_offset.shape == (
        head.num_verts,
        3,
    )


def test_hair_moves_only_the_scalp(person, head):
    moved = person.static_offset.norm(dim=-1)
    assert moved.max() < 0.04
    assert (
        moved[synth.part_verts(head, 'eye_l', 'eye_r', 'teeth_up', 'teeth_low', 'tongue')].max()
        == 0
    )


def test_mask_and_picture_agree(person, head):
    black = shot(person, head, background=0.0)
    white = shot(person, head, background=1.0)
    assert torch.equal(black.mask, white.mask)
    assert 0 <= black.mask.min()
    assert black.mask.max() == 1
    assert torch.allclose(
        white.image - black.image, (1 - black.mask)[..., None].expand(-1, -1, 3), atol=1e-5
    )
    assert (black.image[black.mask == 0] == 0).all()
    assert 0.1 < black.mask.mean() < 0.9


def test_background_picture(person, head):
    bg = torch.rand(128, 128, 3, generator=torch.Generator().manual_seed(0))
    f = shot(person, head, background=bg)
    assert torch.equal(f.image[f.mask == 0], bg[f.mask == 0])


def test_frame_carries_its_parameters(person, head):
    params = synth.random_expression(torch.Generator().manual_seed(1), head=head)
    f = shot(person, head, params=params)
    assert torch.equal(f.params['shape'], person.shape)
    assert all(torch.equal(f.params[k], v) for k, v in params.items())


def test_expression_changes_the_face_only(person, head):
    still = shot(person, head)
    moving = shot(person, head, params=head.arkit({'jawOpen': 1.0}))
    assert (still.image - moving.image).abs()[96:].max() > 0.1  # chin and neck
    assert (still.image - moving.image).abs()[:32].max() < 0.02  # hair


def test_random_draws_repeat(head):
    def draw():
        return (
            synth.random_expression(torch.Generator().manual_seed(7), head=head),
            synth.random_light(torch.Generator().manual_seed(7)),
        )

    (a, la), (b, lb) = draw(), draw()
    assert la == lb and all(torch.equal(a[k], b[k]) for k in a)


def test_table_shapes(table, head):
    for name, shape, kind in (
        ('face_ids', (478,), np.int32),
        ('bary', (478, 3), np.float32),
        ('sigma', (478,), np.float32),
        ('contour', (478,), bool),
        ('valid', (478,), bool),
        ('mirror', (478,), np.int32),
    ):
        assert table[name].shape == shape and table[name].dtype == kind, name
    assert table['valid'].sum() >= 470
    assert table['contour'].sum() == 36
    assert (0 <= table['face_ids']).all()
    assert (table['face_ids'] < len(head.faces)).all()
    assert np.abs(table['bary'].sum(1) - 1).max() < 1e-4
    assert table['bary'].min() >= -1e-5
    assert (table['sigma'][table['valid']] >= 0.001).all()
    assert np.median(table['sigma']) < 0.004


def on_head(table, head):
    verts = head()[0]
    return (
        (verts[head.faces[table['face_ids']]] * torch.as_tensor(table['bary'])[..., None])
        .sum(1)
        .numpy()
    )


def test_table_is_symmetric(table, head):
    p = on_head(table, head)
    m = table['mirror']
    v = table['valid']
    assert (m[m] == np.arange(478)).all()
    assert (v == v[m]).all()
    assert np.array_equal(table['sigma'], table['sigma'][m])
    gap = np.linalg.norm(p - p[m] * [-1, 1, 1], axis=1)[v]
    assert np.median(gap) < 5e-4 and gap.max() < 4e-3


def test_table_knows_the_face(table, head):
    p = on_head(table, head)
    names = np.array(head.part_names)[np.asarray(head.parts)[table['face_ids']]]
    assert set(names[:468]) == {'skin'}
    assert set(names[468:473]) == {'eye_r'}
    assert set(names[473:]) == {'eye_l'}
    assert (
        p[10, 1] > p[168, 1] > p[1, 1] > p[13, 1] > p[152, 1]
    )  # forehead, bridge, nose, lips, chin
    assert (
        p[33, 0] < p[133, 0] < 0 < p[362, 0] < p[263, 0]
    )  # corners of the right eye, then of the left
    assert (
        p[1, 2] == p[:468, 2].max() or p[4, 2] == p[:468, 2].max()
    )  # the tip of the nose is in front


def test_jaw_parts_the_lips(table, head):
    def pts(v):
        return (v[head.faces[table['face_ids']]] * torch.as_tensor(table['bary'])[..., None]).sum(1)

    shut = pts(head()[0])
    wide = pts(head(**head.arkit({'jawOpen': 1.0}))[0])
    for up, low in ((13, 14), (82, 87), (312, 317), (81, 178), (311, 402), (80, 88), (310, 318)):
        assert (wide[up] - wide[low]).norm() - (shut[up] - shut[low]).norm() > 0.015, (up, low)


@pytest.mark.parametrize('yaw', [0, 30])
def test_mediapipe_finds_the_face(yaw, head, table):
    if find_spec('mediapipe') is None:
        pytest.skip('mediapipe is not installed (extra "track")')
    from spatialavatar0.ground.assets import asset
    from spatialavatar0.ground.core import InputError

    try:
        model = asset('face_landmarker')
    except (InputError, OSError) as e:
        pytest.skip(f'no face_landmarker.task: {e}')
    import importlib.util
    import pathlib

    spec = importlib.util.spec_from_file_location(
        'build_landmarks', pathlib.Path(__file__).parents[1] / 'tools/build_landmarks.py'
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    person = synth.make_person(42, head)
    V, K = tool.camera(yaw, 0, head)
    detect = tool.detector(model)
    found = detect(synth.paint(person, V, K, tool.SIZE).image)
    detect.close()
    assert found is not None
    from spatialavatar0.ground.geometry import project

    verts = head(shape=person.shape)[0]
    p = (verts[head.faces[table['face_ids']]] * torch.as_tensor(table['bary'])[..., None]).sum(1)
    error = np.linalg.norm(project(p, V, K)[0].numpy() - found, axis=1)
    keep = table['valid'] & ~table['contour']
    eyes = np.linalg.norm(found[33] - found[263]) / np.cos(np.radians(yaw))
    assert (
        error[keep].mean() / eyes < 0.05
    )  # a person who is not in the table, in units of the outer eye distance


def unit(scores):
    for n, x in scores.items():
        assert 0 <= x.min() and x.max() <= 1, n


@pytest.mark.parametrize('frames', [8, 25, 60, 400])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_take_keeps_its_promises(frames, seed, head):
    w, turn = synth.motion_scores(frames, seed, yaw=25.0)
    unit(w)
    blink = w['eyeBlinkLeft']
    assert {len(x) for x in w.values()} == {frames} == ({len(turn)})
    assert set(w) <= set(head.arkit_names)
    assert (blink == 1).sum() >= (3 if frames < 25 else 6)
    assert torch.equal(blink, w['eyeBlinkRight'])
    yaw = turn[:, 1].rad2deg()
    assert all(
        x[0] == 0 for n, x in w.items() if not n.startswith('eyeLook')
    )  # it begins with a quiet face
    assert yaw[0] == 0 and yaw.abs().max() <= 25.001
    if frames >= 25:
        assert yaw[: (frames + 1) // 2].max() > 22
        assert yaw[: (frames + 1) // 2].min() < -22  # both sides, in the first half of any take
    assert turn[:, [0, 2]].rad2deg().abs().max() <= 16.001


def test_long_takes_are_smooth(head):
    for seed in range(4):
        verts = torch.cat([head(**p) for p in synth.motion(200, seed, head)])
        step = (verts[1:] - verts[:-1]).norm(dim=-1)
        assert step.max() < 0.015
        assert step.mean() < 0.004
        assert step.amax(1).median() > 0.001  # metres a frame: nothing jumps, nothing stands still


def test_takes_repeat_and_differ(head):
    a = synth.motion(20, 5, head)
    b = synth.motion(20, 5, head)
    c = synth.motion(20, 6, head)
    assert all(torch.equal(p[k], q[k]) for p, q in zip(a, b) for k in p)
    assert any((p['expr'] != q['expr']).any() for p, q in zip(a, c))
    assert all(v.shape[0] == 1 for p in a for v in p.values())
    assert set(a[0]) == {
        'expr',
        'jaw',
        'eyes',
        'rotation',
        'neck',
        'translation',
    }
    with pytest.raises(ValueError, match='at least 8 frames'):
        synth.motion(7)


def test_blinks_hide_the_eyes(head, person):
    from spatialavatar0.splats.mesh import rasterize_mesh

    balls = torch.tensor([head.part_names.index(n) for n in ('eye_l', 'eye_r')])

    def seen(p):
        ids = rasterize_mesh(
            head(shape=person.shape, **p)[0],
            head.faces,
            *synth.portrait_camera(head, 256),
            256,
            256,
        )[0]
        return torch.isin(head.parts[ids[ids >= 0]], balls).sum().item()

    for seed in range(3):
        take = synth.motion(100, seed, head)
        blink = synth.motion_scores(100, seed)[0]['eyeBlinkLeft']
        shut = [seen(take[t]) for t in (blink == 1).nonzero()[:, 0].tolist()]
        wide = [seen(take[t]) for t in (blink == 0).nonzero()[::6, 0].tolist()]
        assert max(shut) <= 0.1 * np.median(wide)
        assert np.median(wide) > 60


def test_clip_is_lazy_and_steady(head, person):
    clip = synth.mono_clip(person, 40, 48, seed=2, head=head)
    a = clip[7]
    assert torch.equal(a.image, clip[7].image)
    assert torch.equal(a.image, synth.mono_clip(person, 40, 48, seed=2, head=head)[7].image)
    part = clip[4::10].frames
    assert [f.time for f in part] == [4, 14, 24, 34]
    assert all(torch.equal(f.viewmat, a.viewmat) and torch.equal(f.K, a.K) for f in part)
    bg = a.image[0, 0]
    assert all(
        torch.equal(f.image[f.mask == 0], bg.expand(int((f.mask == 0).sum()), 3)) for f in part
    )  # one colour, all the time
    assert all(
        f.mask[0].max() == 0 and f.mask[:, 0].max() == 0 and f.mask[:, -1].max() == 0 for f in part
    )  # nobody leaves the picture
    assert 'static_offset' not in a.params
    assert torch.equal(a.params['shape'], person.shape)


def test_background_drifts(head, person):
    clip = synth.mono_clip(person, 50, 32, seed=2, drift=True, head=head)
    c = torch.stack([clip[t].image[0, 0] for t in range(0, 50, 7)])
    assert 0 < (c[1:] - c[:-1]).abs().max() < 0.2
    assert (c[-1] - c[0]).abs().max() > 0.05


def test_light_stays_in_the_room(head, person):
    "Turning the head is walking around it, camera and lamp in hand."
    from spatialavatar0.ground.geometry import axis_angle_to_mat

    turn = torch.tensor([0.0, 0.6, 0])
    R = axis_angle_to_mat(turn)
    V, K = synth.portrait_camera(head, 96)
    d = torch.tensor([1.0, 0.3, 0.4])
    joint = (head.J_regressor @ head.rest(person.shape, static_offset=person.static_offset)[0])[0]
    T = torch.eye(4)
    T[:3, :3], T[:3, 3] = R, joint - R @ joint

    def shot(V, d, **p):
        return synth.paint(person, V, K, 96, p, synth.Light(tuple(d.tolist()), 0.2, 0.8), head=head)

    a = shot(V, d, rotation=turn[None])
    b = shot(V @ T, R.T @ d)
    assert (a.image - b.image).abs().mean() < 1e-3
    assert (a.image - shot(V @ T, d).image).abs().mean() > 0.02


def test_novel_views(head, person):
    views = synth.novel_views(person, 48, head=head)
    assert len(views) == 12
    assert [f.camera for f in views][:5] == ['-75', '-55', '+55', '+75', '-75']
    assert [f.time for f in views] == sorted(f.time for f in views)

    def eye(f):
        return -f.viewmat[:3, :3].T @ f.viewmat[:3, 3] - synth.face_centre(head)

    for f, yaw in zip(views, (-75, -55, 55, 75)):
        e = eye(f)
        assert abs(torch.atan2(e[0], e[2]).rad2deg() - yaw) < 0.1
        assert 0.2 < f.mask.mean() < 0.7
    assert (views[0].params['jaw'] == 0).all()
    assert (views[4].params['jaw'] != 0).any()
