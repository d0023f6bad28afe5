"""Synthetic people, and the table of MediaPipe's landmarks on the open head."""

from importlib.resources import files
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch

from spatialavatar0.ground.geometry import axis_angle_to_mat, intrinsics, orbit, project
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures import people as synth
from spatialavatar0.splats.mesh import rasterize_mesh


@pytest.fixture(scope='module')
def head():
    return open_head()


@pytest.fixture(scope='module')
def person(head):
    return synth.make_person(3, head)


@pytest.fixture(scope='module')
def table():
    with np.load(files('spatialavatar0') / 'assets/open_landmarks.npz') as arrays:
        return dict(arrays)


def shot(person, head, yaw=0, size=128, **options):
    viewmat = orbit(yaw, 0, 0.55, synth.face_centre(head))
    K = intrinsics(1.95 * size, size, size)
    return synth.paint(person, viewmat, K, size, head=head, **options)


def test_same_seed_same_person(head, person):
    again = synth.make_person(3, head)
    other = synth.make_person(4, head)
    for name in ('shape', 'texture', 'static_offset'):
        assert torch.equal(getattr(person, name), getattr(again, name))
        assert not torch.equal(getattr(person, name), getattr(other, name))


def test_global_seed_is_not_touched(head):
    torch.manual_seed(0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    synth.make_person(5, head)
    assert torch.equal(torch.rand(3), drawn)


def test_texture_in_range(person, head):
    assert person.texture.shape == (256, 256, 3)
    assert 0 <= person.texture.min()
    assert person.texture.max() <= 1
    assert person.shape.shape == (1, head.num_shape)
    assert person.static_offset.shape == (head.num_verts, 3)


def test_hair_moves_only_the_scalp(person, head):
    moved = person.static_offset.norm(dim=-1)
    inside = synth.part_verts(head, 'eye_l', 'eye_r', 'teeth_up', 'teeth_low', 'tongue')
    assert moved.max() < 0.04
    assert moved[inside].max() == 0


def test_mask_and_picture_agree(person, head):
    black = shot(person, head, background=0.0)
    white = shot(person, head, background=1.0)
    assert torch.equal(black.mask, white.mask)
    assert 0 <= black.mask.min()
    assert black.mask.max() == 1
    background = (1 - black.mask)[..., None].expand(-1, -1, 3)
    assert torch.allclose(white.image - black.image, background, atol=1e-5)
    assert (black.image[black.mask == 0] == 0).all()
    assert 0.1 < black.mask.mean() < 0.9


def test_background_picture(person, head):
    wall = torch.rand(128, 128, 3, generator=torch.Generator().manual_seed(0))
    frame = shot(person, head, background=wall)
    assert torch.equal(frame.image[frame.mask == 0], wall[frame.mask == 0])


def test_frame_carries_its_parameters(person, head):
    params = synth.random_expression(torch.Generator().manual_seed(1), head=head)
    frame = shot(person, head, params=params)
    assert torch.equal(frame.params['shape'], person.shape)
    assert all(torch.equal(frame.params[name], value) for name, value in params.items())


def test_expression_changes_the_face_only(person, head):
    still = shot(person, head)
    moving = shot(person, head, params=head.arkit({'jawOpen': 1.0}))
    change = (still.image - moving.image).abs()
    assert change[96:].max() > 0.1  # chin and neck
    assert change[:32].max() < 0.02  # hair


def test_random_draws_repeat(head):
    def seeded():
        return torch.Generator().manual_seed(7)

    first, again = (synth.random_expression(seeded(), head=head) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert synth.random_light(seeded()) == synth.random_light(seeded())


def test_table_shapes(table, head):
    wanted = dict(
        face_ids=((478,), np.int32),
        bary=((478, 3), np.float32),
        sigma=((478,), np.float32),
        contour=((478,), bool),
        valid=((478,), bool),
        mirror=((478,), np.int32),
    )
    for name, (shape, kind) in wanted.items():
        assert table[name].shape == shape and table[name].dtype == kind, name
    assert table['valid'].sum() >= 470
    assert table['contour'].sum() == 36
    assert (0 <= table['face_ids']).all()
    assert (table['face_ids'] < len(head.faces)).all()
    assert np.abs(table['bary'].sum(1) - 1).max() < 1e-4
    assert table['bary'].min() >= -1e-5
    assert (table['sigma'][table['valid']] >= 0.001).all()
    assert np.median(table['sigma']) < 0.004


def landmarks(table, head, verts):
    "(478,3) where MediaPipe's landmarks lie on a posed head."
    corners = verts[head.faces[table['face_ids']]]
    return (corners * torch.as_tensor(table['bary'])[..., None]).sum(1)


def test_table_is_symmetric(table, head):
    points = landmarks(table, head, head()[0]).numpy()
    mirror, valid = table['mirror'], table['valid']
    assert (mirror[mirror] == np.arange(478)).all()
    assert (valid == valid[mirror]).all()
    assert np.array_equal(table['sigma'], table['sigma'][mirror])
    gap = np.linalg.norm(points - points[mirror] * [-1, 1, 1], axis=1)[valid]
    assert np.median(gap) < 5e-4 and gap.max() < 4e-3


def test_table_knows_the_face(table, head):
    x, y, z = landmarks(table, head, head()[0]).numpy().T
    names = np.array(head.part_names)[np.asarray(head.parts)[table['face_ids']]]
    assert set(names[:468]) == {'skin'}
    assert set(names[468:473]) == {'eye_r'}
    assert set(names[473:]) == {'eye_l'}
    assert y[10] > y[168] > y[1] > y[13] > y[152]  # forehead, bridge, nose, lips, chin
    assert x[33] < x[133] < 0 < x[362] < x[263]  # corners of the right eye, then of the left
    assert z[:468].max() in (z[1], z[4])  # the tip of the nose is in front


LIPS = (13, 14), (82, 87), (312, 317), (81, 178), (311, 402), (80, 88), (310, 318)


def test_jaw_parts_the_lips(table, head):
    shut = landmarks(table, head, head()[0])
    wide = landmarks(table, head, head(**head.arkit({'jawOpen': 1.0}))[0])
    for up, low in LIPS:
        assert (wide[up] - wide[low]).norm() - (shut[up] - shut[low]).norm() > 0.015, (up, low)


def landmark_model():
    "The path of MediaPipe's model; skips the test where it is not here."
    from spatialavatar0.ground.assets import asset
    from spatialavatar0.ground.core import InputError

    if find_spec('mediapipe') is None:
        pytest.skip('mediapipe is not installed (extra "track")')
    try:
        return asset('face_landmarker')
    except (InputError, OSError) as e:
        pytest.skip(f'no face_landmarker.task: {e}')


def landmark_tool():
    "The script that makes the table, as a module."
    path = Path(__file__).parents[1] / 'tools/build_landmarks.py'
    spec = spec_from_file_location('build_landmarks', path)
    tool = module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.mark.parametrize('yaw', [0, 30])
def test_mediapipe_finds_the_face(yaw, head, table):
    "A person who is not in the table; errors in units of the distance of the outer eye corners."
    model = landmark_model()
    tool = landmark_tool()
    person = synth.make_person(42, head)
    viewmat, K = tool.camera(yaw, 0, head)
    detect = tool.detector(model)
    found = detect(synth.paint(person, viewmat, K, tool.SIZE).image)
    detect.close()
    assert found is not None
    points = landmarks(table, head, head(shape=person.shape)[0])
    error = np.linalg.norm(project(points, viewmat, K)[0].numpy() - found, axis=1)
    keep = table['valid'] & ~table['contour']
    eyes = np.linalg.norm(found[33] - found[263]) / np.cos(np.radians(yaw))
    assert error[keep].mean() / eyes < 0.05


def check_unit(scores):
    for name, score in scores.items():
        assert 0 <= score.min() and score.max() <= 1, name


@pytest.mark.parametrize('frames', [8, 25, 60, 400])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_take_keeps_its_promises(frames, seed, head):
    scores, turn = synth.motion_scores(frames, seed, yaw=25.0)
    check_unit(scores)
    blink = scores['eyeBlinkLeft']
    assert {len(score) for score in scores.values()} == {frames} == {len(turn)}
    assert set(scores) <= set(head.arkit_names)
    assert (blink == 1).sum() >= (3 if frames < 25 else 6)
    assert torch.equal(blink, scores['eyeBlinkRight'])
    quiet = [score[0] for name, score in scores.items() if not name.startswith('eyeLook')]
    assert not any(quiet)  # it begins with a quiet face


@pytest.mark.parametrize('frames', [8, 25, 60, 400])
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_a_take_turns_to_both_sides(frames, seed):
    _, turn = synth.motion_scores(frames, seed, yaw=25.0)
    yaw = turn[:, 1].rad2deg()
    assert yaw[0] == 0 and yaw.abs().max() <= 25.001
    assert turn[:, [0, 2]].rad2deg().abs().max() <= 16.001
    if frames >= 25:  # both sides, in the first half of any take
        early = yaw[: (frames + 1) // 2]
        assert early.max() > 22
        assert early.min() < -22


def test_long_takes_are_smooth(head):
    "Metres a frame: nothing jumps, nothing stands still."
    for seed in range(4):
        verts = torch.cat([head(**pose) for pose in synth.motion(200, seed, head)])
        step = (verts[1:] - verts[:-1]).norm(dim=-1)
        assert step.max() < 0.015
        assert step.mean() < 0.004
        assert step.amax(1).median() > 0.001


def test_takes_repeat_and_differ(head):
    take, again, other = (synth.motion(20, seed, head) for seed in (5, 5, 6))
    for one, same in zip(take, again):
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert all(len(value) == 1 for value in one.values())
    assert any((p['expr'] != q['expr']).any() for p, q in zip(take, other))
    assert set(take[0]) == {'expr', 'jaw', 'eyes', 'rotation', 'neck', 'translation'}
    with pytest.raises(ValueError, match='at least 8 frames'):
        synth.motion(7)


def eye_pixels(head, person, pose):
    "How many pixels of a portrait show an eyeball."
    balls = torch.tensor([head.part_names.index(name) for name in ('eye_l', 'eye_r')])
    verts = head(shape=person.shape, **pose)[0]
    viewmat, K = synth.portrait_camera(head, 256)
    ids, _, _ = rasterize_mesh(verts, head.faces, viewmat, K, 256, 256)
    return torch.isin(head.parts[ids[ids >= 0]], balls).sum().item()


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_blinks_hide_the_eyes(seed, head, person):
    take = synth.motion(100, seed, head)
    blink = synth.motion_scores(100, seed)[0]['eyeBlinkLeft']
    closed = (blink == 1).nonzero()[:, 0].tolist()
    opened = (blink == 0).nonzero()[::6, 0].tolist()
    shut = [eye_pixels(head, person, take[t]) for t in closed]
    wide = [eye_pixels(head, person, take[t]) for t in opened]
    assert max(shut) <= 0.1 * np.median(wide)
    assert np.median(wide) > 60


def test_clip_is_lazy_and_steady(head, person):
    clip = synth.mono_clip(person, 40, 48, seed=2, head=head)
    frame = clip[7]
    assert torch.equal(frame.image, clip[7].image)
    assert torch.equal(frame.image, synth.mono_clip(person, 40, 48, seed=2, head=head)[7].image)
    part = clip[4::10].frames
    assert [f.time for f in part] == [4, 14, 24, 34]
    wall = frame.image[0, 0]
    for f in part:
        assert torch.equal(f.viewmat, frame.viewmat) and torch.equal(f.K, frame.K)
        assert (f.image[f.mask == 0] == wall).all()  # one colour, all the time
        assert not any(rim.any() for rim in (f.mask[0], f.mask[:, 0], f.mask[:, -1]))
    assert 'static_offset' not in frame.params
    assert torch.equal(frame.params['shape'], person.shape)


def test_background_drifts(head, person):
    clip = synth.mono_clip(person, 50, 32, seed=2, drift=True, head=head)
    wall = torch.stack([clip[t].image[0, 0] for t in range(0, 50, 7)])
    assert 0 < (wall[1:] - wall[:-1]).abs().max() < 0.2
    assert (wall[-1] - wall[0]).abs().max() > 0.05


def test_light_stays_in_the_room(head, person):
    "Turning the head is walking around it, camera and lamp in hand."
    turn = torch.tensor([0.0, 0.6, 0])
    lamp = torch.tensor([1.0, 0.3, 0.4])
    R = axis_angle_to_mat(turn)
    viewmat, K = synth.portrait_camera(head, 96)
    rest = head.rest(person.shape, static_offset=person.static_offset)[0]
    joint = (head.J_regressor @ rest)[0]
    around = torch.eye(4)
    around[:3, :3] = R
    around[:3, 3] = joint - R @ joint

    def lit(viewmat, lamp, **pose):
        light = synth.Light(tuple(lamp.tolist()), 0.2, 0.8)
        return synth.paint(person, viewmat, K, 96, pose, light, head=head).image

    turned = lit(viewmat, lamp, rotation=turn[None])
    walked = lit(viewmat @ around, R.T @ lamp)
    assert (turned - walked).abs().mean() < 1e-3
    assert (turned - lit(viewmat @ around, lamp)).abs().mean() > 0.02


def test_novel_views(head, person):
    views = synth.novel_views(person, 48, head=head)
    assert len(views) == 12
    assert [f.camera for f in views][:5] == ['-75', '-55', '+55', '+75', '-75']
    assert [f.time for f in views] == sorted(f.time for f in views)
    for f, yaw in zip(views, (-75, -55, 55, 75)):
        eye = -f.viewmat[:3, :3].T @ f.viewmat[:3, 3] - synth.face_centre(head)
        assert abs(torch.atan2(eye[0], eye[2]).rad2deg() - yaw) < 0.1
        assert 0.2 < f.mask.mean() < 0.7
    assert (views[0].params['jaw'] == 0).all()
    assert (views[4].params['jaw'] != 0).any()
