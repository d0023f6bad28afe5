"""Clips: held or made on demand, split, written and read as VHAP folders; folders made by hand,
damaged ones, hostile ones."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import intrinsics, orbit, project
from spatialavatar0.head.head import Head, open_head
from spatialavatar0.pictures import people as synth
from spatialavatar0.pictures.clips import (
    Clip,
    Frame,
    head_fingerprint,
    load_vhap,
    read_vhap,
    split,
    write_vhap,
)


@pytest.fixture(scope='module')
def head():
    return open_head()


def frame(time=0, camera='0', height=12, width=16, **params):
    generator = torch.Generator().manual_seed(1000 + time)
    image = torch.rand(height, width, 3, generator=generator)
    mask = torch.rand(height, width, generator=generator)
    viewmat = orbit(10 * time, 5, 0.6)
    return Frame(image, mask, viewmat, intrinsics(30.0, width, height), params, time, camera)


class Maker:
    "A function i -> frame that keeps what it was asked for."

    def __init__(self):
        self.made = []

    def __call__(self, i):
        self.made.append(i)
        return frame(i)


# ---- a clip


def test_slices_make_nothing():
    maker = Maker()
    clip = Clip(maker, 1000)
    part = clip[900:][::10][[0, -1]]
    train, test = split(clip, blocks=5)
    assert maker.made == []
    assert (len(part), len(train), len(test)) == (2, 800, 200)
    assert part[1].time == 990 and maker.made == [990]
    assert [f.time for f in test[:2]] == [160, 161]


def test_cache_keeps_so_many():
    maker = Maker()
    clip = Clip(maker, 10, cache=2)
    for i in (0, 1, 0, 2, 0, 1):
        clip[i]
    assert maker.made == [0, 1, 2, 1]


class Sevens:
    "A sequence of its own kind."

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return frame(7 * i)


@pytest.mark.parametrize(
    'source',
    (
        Sevens,
        lambda: [frame(0), frame(7), frame(14)],
        lambda: (frame(7 * i) for i in range(3)),
        lambda: Clip(Sevens()),
    ),
)
def test_any_source(source):
    clip = Clip(source())
    assert [f.time for f in clip] == [0, 7, 14]
    assert [f.time for f in clip.frames] == [0, 7, 14]
    assert clip[-1].time == clip[np.int64(2)].time == 14


def test_no_such_frame():
    with pytest.raises(IndexError):
        Clip(Sevens())[3]
    with pytest.raises(ValueError, match='length'):
        Clip(lambda i: frame(i))


@pytest.mark.parametrize('n,blocks,share', [(10, 1, 0.2), (100, 5, 0.2), (7, 3, 0.3), (2, 1, 0.5)])
def test_split_is_a_partition(n, blocks, share):
    train, test = split(Clip(lambda i: i, n), share, blocks)
    assert sorted([*train, *test]) == list(range(n))
    assert len(train)
    assert len(test) >= blocks
    if blocks == 1:
        assert max(train) < min(test)


def test_split_refuses():
    for bad in (dict(test=0.0), dict(test=1.0), dict(blocks=6)):
        with pytest.raises(InputError):
            split(Clip(lambda i: i, 10), **bad)


def test_pose_is_what_moves(head):
    offset = torch.zeros(1, head.num_verts, 3)
    posed = frame(shape=torch.zeros(1, 100), static_offset=offset, jaw=torch.zeros(1, 3))
    assert set(posed.pose) == {'jaw'}


# ---- a folder made by hand, from the format's description alone

SHIFT = [0.01, 0.02, 0.03]  # translation of the head
EYE = [-0.051, -0.06, 0.6]  # place of the camera, which looks along -z
LENS = dict(
    cx=37.0,
    cy=33.0,
    fl_x=200.0,
    fl_y=180.0,
    h=60,
    w=80,
    camera_angle_x=2 * math.atan(0.2),
    camera_angle_y=2 * math.atan(1 / 6),
)
CAMERA_TO_WORLD = [
    [1, 0, 0, EYE[0]],
    [0, 1, 0, EYE[1]],
    [0, 0, 1, EYE[2]],
    [0, 0, 0, 1],
]


def tip_of_nose(head):
    "The foremost vertex of the skin."
    skin = head.parts.numpy() == head.part_names.index('skin')
    nose = np.unique(head.faces.numpy()[skin])
    return int(nose[head.template.numpy()[nose, 2].argmax()])


def pixel_of_nose(head):
    "Where the nose of the head must be that hangs 90 degrees over to its side: column and row."
    joint = (head.J_regressor.double() @ head.template.double())[0].numpy()
    x, y, z = head.template.double().numpy()[tip_of_nose(head)] - joint
    # a quarter turn about z: x -> y, y -> -x; then the translation
    place = np.array([-y, x, z]) + joint + SHIFT
    right, up, back = place - np.array(EYE)
    column = 200 * right / -back + 37
    row = 33 - 180 * up / -back  # rows count downwards
    assert 0 < column < 80 and 0 < row < 60
    return int(column), int(row)


def flame_param(head, step, offset):
    "The head at a time step, as arrays of the format."
    arrays = dict(
        translation=[SHIFT],
        rotation=[[0, 0, math.pi / 2]],
        neck_pose=[[0, 0, 0]],
        jaw_pose=[[0.1 * step, 0, 0]],
        eyes_pose=[[0, 0.1, 0, 0, 0.2, 0]],
        expr=np.zeros((1, 100)),
        shape=np.zeros(300),
        static_offset=np.zeros((1, head.num_verts, 3)) if offset is None else offset,
    )
    return {name: np.array(array, np.float32) for name, array in arrays.items()}


def entry_by_hand(step, camera, up):
    return dict(
        timestep_index=step,
        timestep_index_original=10 * step,
        timestep_id=f'{10 * step:05d}',
        camera_index=camera,
        camera_id=f'cam{camera}',
        **LENS,
        transform_matrix=CAMERA_TO_WORLD,
        file_path=f'{up}images/{step:05d}_{camera:02d}.png',
        fg_mask_path=f'{up}fg_masks/{step:05d}_{camera:02d}.png',
        flame_param_path=f'{up}flame_param/{step:05d}.npz',
    )


def transforms_by_hand(folder, frames, some, name):
    "A transforms file with some of the frames."
    top = {key: frames[0][key] for key in LENS if key in frames[0]}
    top.update(
        timestep_indices=sorted({f['timestep_index'] for f in frames}),
        camera_indices=sorted({f['camera_index'] for f in frames}),
        frames=some,
    )
    (folder / f'transforms{name}.json').write_text(json.dumps(top))


def by_hand(folder, head, steps=4, cameras=1, offset=None, up='', **change):
    """A VHAP folder written without the writer. The head hangs 90 degrees over to its side; a white
    pixel is painted where its nose must be."""
    column, row = pixel_of_nose(head)
    image = np.zeros((60, 80, 3), np.uint8)
    image[row, column] = 255
    for name in ('images', 'fg_masks', 'flame_param'):
        (folder / name).mkdir(parents=True, exist_ok=True)
    frames = []
    for step in range(steps):
        np.savez(folder / f'flame_param/{step:05d}.npz', **flame_param(head, step, offset))
        mask = np.full((60, 80), 51 * step, np.uint8)
        for camera in range(cameras):
            name = f'{step:05d}_{camera:02d}.png'
            Image.fromarray(image).save(folder / 'images' / name)
            Image.fromarray(mask).save(folder / 'fg_masks' / name)
            frames.append({**entry_by_hand(step, camera, up), **change})
    np.savez(folder / 'canonical_flame_param.npz', shape=np.zeros(300, np.float32))
    cut = math.ceil(0.7 * steps)
    transforms_by_hand(folder, frames, frames, '')
    transforms_by_hand(folder, frames, [f for f in frames if f['timestep_index'] < cut], '_train')
    transforms_by_hand(folder, frames, [], '_val')
    transforms_by_hand(folder, frames, [f for f in frames if f['timestep_index'] >= cut], '_test')


def edit(folder, change, name='transforms.json'):
    top = json.loads((folder / name).read_text())
    change(top)
    (folder / name).write_text(json.dumps(top))


def test_golden(tmp_path, head):
    by_hand(tmp_path, head)
    nose = tip_of_nose(head)
    clip = load_vhap(tmp_path)
    assert [len(read_vhap(tmp_path, name)) for name in (None, 'train', 'val', 'test')] == [
        4,
        3,
        0,
        1,
    ]
    for f in clip:
        pixel, depth = project(head(**f.params)[0][nose], f.viewmat, f.K)
        assert f.image[int(pixel[1]), int(pixel[0])].min() == 1
        assert f.image.sum() == 3
        assert 0.3 < depth < 0.6


def test_golden_numbers(tmp_path, head):
    by_hand(tmp_path, head)
    for step, f in enumerate(load_vhap(tmp_path)):
        assert f.image.shape == (60, 80, 3)
        assert torch.allclose(f.mask, torch.tensor(0.2 * step))
        assert (f.time, f.camera) == (step, 'cam0')
        assert torch.equal(f.K, torch.tensor([[200.0, 0, 37], [0, 180, 33], [0, 0, 1]]))
        assert torch.allclose(f.params['jaw'], torch.tensor([[0.1 * step, 0, 0]]))
        assert torch.allclose(f.params['eyes'], torch.tensor([[0, 0.1, 0, 0, 0.2, 0]]))
        assert f.params['shape'].shape == (1, 100)
        assert f.params['expr'].shape == (1, 52)
        assert 'static_offset' not in f.params


def test_offset_is_the_persons(tmp_path, head):
    offset = np.random.default_rng(0).normal(0, 0.01, (1, head.num_verts, 3)).astype(np.float32)
    by_hand(tmp_path, head, steps=1, offset=offset)
    f = load_vhap(tmp_path)[0]
    assert np.array_equal(f.params['static_offset'].numpy(), offset)
    assert 'static_offset' not in f.pose
    moves = ('rotation', 'translation', 'jaw', 'eyes', 'neck')
    still = {name: code for name, code in f.params.items() if name not in moves}
    assert torch.allclose(head(**still)[0], head.template + torch.from_numpy(offset[0]), atol=1e-6)


def test_union_of_sequences(tmp_path, head):
    by_hand(tmp_path / 'EMO-1', head, steps=2)
    by_hand(tmp_path / 'union', head, steps=2, up='../EMO-1/')
    for name in ('images', 'fg_masks', 'flame_param'):
        for path in (tmp_path / 'union' / name).iterdir():
            path.unlink()
    assert len(load_vhap(tmp_path / 'union').frames) == 2


@pytest.mark.parametrize(
    'path',
    [
        '../../secret.png',
        '/etc/passwd',
        'images/../../../secret.png',
        '..\\..\\secret.png',
        '../EMO/../../secret.png',
        7,
    ],
)
@pytest.mark.parametrize('key', ['file_path', 'fg_mask_path', 'flame_param_path'])
def test_no_path_leads_out(tmp_path, head, path, key):
    by_hand(tmp_path / 'a/b', head, steps=1, **{key: path})
    with pytest.raises(InputError, match='leads out|expected a path'):
        read_vhap(tmp_path / 'a/b')


def test_camera_defaults(tmp_path, head):
    by_hand(tmp_path, head, steps=1)

    def strip(top):
        for entry in (top, *top['frames']):
            for name in ('fl_x', 'fl_y', 'cx', 'cy'):
                entry.pop(name)

    edit(tmp_path, strip)
    expected = torch.tensor([[200.0, 0, 40], [0, 200, 30], [0, 0, 1]])
    assert torch.allclose(load_vhap(tmp_path)[0].K, expected)


def test_matte_from_alpha_or_nowhere(tmp_path, head):
    by_hand(tmp_path, head, steps=1, fg_mask_path=None)
    with pytest.warns(UserWarning, match='no matte'):
        f = read_vhap(tmp_path)[0]
    assert f.mask.min() == 1
    rgba = np.zeros((60, 80, 4), np.uint8)
    rgba[10:20, :, 3] = 102
    Image.fromarray(rgba).save(tmp_path / 'images/00000_00.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        f = read_vhap(tmp_path)[0]
    assert f.image.shape == (60, 80, 3)
    assert torch.allclose(f.mask[10:20], torch.tensor(0.4))
    assert f.mask[:10].max() == 0


# ---- links inside of a data set


def moved_out(folder, name, home):
    "What lies in a data set, on another disk, and a link in its place."
    target = home / 'disk' / name
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / name).rename(target)
    (folder / name).symlink_to(target)
    return target


@pytest.mark.parametrize('name', ['images', 'fg_masks', 'flame_param'])
def test_a_folder_on_another_disk(tmp_path, head, name):
    "It is read, and one note says where it leads."
    by_hand(tmp_path / 'sets/film', head)
    expected = load_vhap(tmp_path / 'sets/film').frames
    target = moved_out(tmp_path / 'sets/film', name, tmp_path)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter('default')
        read = load_vhap(tmp_path / 'sets/film').frames
    assert len(notes) == 1
    assert str(notes[0].message).endswith(f'{name} links to {target}, read there')
    for ours, theirs in zip(expected, read, strict=True):
        same(ours, theirs)


def test_a_whole_set_on_another_disk(tmp_path, head):
    "No note: the path that was given is the link."
    by_hand(tmp_path / 'disk/film', head)
    (tmp_path / 'sets').mkdir()
    (tmp_path / 'sets/film').symlink_to(tmp_path / 'disk/film')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(load_vhap(tmp_path / 'sets/film').frames) == 4


def test_a_neighbour_on_another_disk(tmp_path, head):
    by_hand(tmp_path / 'disk/EMO-1', head, steps=2)
    by_hand(tmp_path / 'sets/union', head, steps=2, up='../EMO-1/')
    (tmp_path / 'sets/EMO-1').symlink_to(tmp_path / 'disk/EMO-1')
    with pytest.warns(UserWarning, match='EMO-1 links to .*disk/EMO-1'):
        assert len(load_vhap(tmp_path / 'sets/union').frames) == 2


@pytest.mark.parametrize('inside', [False, True])
def test_a_file_somewhere_else(tmp_path, head, monkeypatch, inside):
    "Refused, naming its target and the option; the option reads it. Behind a link, the same."
    by_hand(tmp_path / 'sets/film', head, steps=2)
    place = tmp_path / 'sets/film'
    if inside:
        moved_out(place, 'images', tmp_path)
    name = 'images/00001_00.png'
    secret = tmp_path / 'private/me.png'
    secret.parent.mkdir()
    (place / name).rename(secret)
    (place / name).symlink_to(secret)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(
            InputError, match='link that leads out of the data set, to .*--follow-links'
        ):
            load_vhap(place)
    monkeypatch.setenv('SPATIALAVATAR0_FOLLOW_LINKS', '1')
    with pytest.warns(UserWarning, match='files of .*link to .*private'):
        assert len(load_vhap(place).frames) == 2


@pytest.mark.parametrize('target', ['/', '/proc', '/proc/self', '/sys'])
def test_links_that_are_never_followed(tmp_path, head, monkeypatch, target):
    monkeypatch.setenv('SPATIALAVATAR0_FOLLOW_LINKS', '1')
    by_hand(tmp_path / 'sets/film', head, steps=1, file_path='all/etc/hostname')
    (tmp_path / 'sets/film/all').symlink_to(target)
    with pytest.raises(InputError, match='a link that leads out of the data set, to /'):
        load_vhap(tmp_path / 'sets/film')[0]


@pytest.mark.parametrize('kind', ['text', 'pipe', 'folder', 'nothing', 'device'])
def test_a_link_to_what_is_no_picture(tmp_path, head, kind):
    "One clear error in time; what stands in a foreign file is never quoted."
    by_hand(tmp_path / 'sets/film', head, steps=1)
    target = moved_out(tmp_path / 'sets/film', 'images', tmp_path)
    picture = target / '00000_00.png'
    picture.unlink()
    if kind == 'text':
        picture.write_text('password: swordfish')
    elif kind == 'pipe':
        os.mkfifo(picture)
    elif kind == 'folder':
        picture.mkdir()
    elif kind == 'device':
        (tmp_path / 'sets/film/images').unlink()
        (tmp_path / 'sets/film/images').symlink_to('/dev')
        edit(tmp_path / 'sets/film', lambda top: top['frames'][0].update(file_path='images/zero'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(InputError, match='not a readable picture|files are missing') as error:
            load_vhap(tmp_path / 'sets/film')[0]
    assert 'swordfish' not in str(error.value)


# ---- damage: what is done to a folder, and what the error must say


def text(words, name='transforms.json'):
    return lambda folder: (folder / name).write_text(words)


def top_(**change):
    return lambda folder: edit(folder, lambda top: top.update(change))


def entry_(i, **change):
    return lambda folder: edit(folder, lambda top: top['frames'][i].update(change))


def without(i, name):
    return lambda folder: edit(folder, lambda top: top['frames'][i].pop(name))


def row_(k, row):
    "Another row of the first matrix."

    def change(top):
        top['frames'][0]['transform_matrix'][k] = row

    return lambda folder: edit(folder, change)


def short_matrix(folder):
    edit(folder, lambda top: top['frames'][0]['transform_matrix'].pop())


def picture_(array, name='images/00000_00.png'):
    return lambda folder: Image.fromarray(array).save(folder / name)


def torn_picture(folder):
    path = folder / 'images/00000_00.png'
    path.write_bytes(path.read_bytes()[:70])


def more(folder, **arrays):
    "Other arrays in the first file of parameters."
    with np.load(folder / 'flame_param/00000.npz') as old:
        np.savez(folder / 'flame_param/00000.npz', **{**old, **arrays})


def more_(**arrays):
    return lambda folder: more(folder, **arrays)


def only_(**arrays):
    return lambda folder: np.savez(folder / 'flame_param/00000.npz', **arrays)


BAD_TABLE = {
    'not JSON': (text('{"frames": ['), 'not readable JSON'),
    'a list': (text('[]'), 'an object with a list of frames'),
    'no frames': (top_(frames=[]), 'no frames'),
    'a frame is null': (top_(frames=[None]), 'frame 0 should be an object'),
    'no params': (without(1, 'flame_param_path'), 'frame 1 has no flame_param_path'),
    'another head': (top_(head='0' * 16), 'made on another head'),
    'half a step': (entry_(0, timestep_index=0.5), 'whole number'),
    'endless name': (entry_(0, fg_mask_path='x' * 5000), 'expected a path'),
}
BAD_CAMERA = {
    'no matrix': (without(1, 'transform_matrix'), 'frame 1: its camera cannot be read'),
    'ragged matrix': (entry_(0, transform_matrix=[[1, 0], [0]]), 'its camera cannot be read'),
    '3 x 4 matrix': (short_matrix, '4 x 4'),
    'mirrored matrix': (
        entry_(0, transform_matrix=np.diag([-1.0, 1, 1, 1]).tolist()),
        'with a rotation',
    ),
    'scaled matrix': (
        entry_(0, transform_matrix=np.diag([4.0, 4, 4, 1]).tolist()),
        'with a rotation',
    ),
    'NaN in a matrix': (row_(0, [1, 0, 0, math.nan]), 'with a rotation'),
    'last row 0': (row_(3, [0, 0, 0, 0]), 'with a rotation'),
    'endless width': (entry_(0, w=math.inf), 'cannot be read'),
    'focal 0': (entry_(0, fl_x=0), 'should be positive'),
    'width': (entry_(0, w=81), '80 x 60 pixels, transforms.json says 81 x 60'),
}
BAD_PICTURES = {
    'small matte': (
        picture_(np.zeros((30, 40), np.uint8), 'fg_masks/00000_00.png'),
        '40 x 30 pixels',
    ),
    'a missing picture': (
        lambda folder: (folder / 'images/00001_00.png').unlink(),
        '1 of 6 files are missing.*00001_00.png',
    ),
    'torn picture': (torn_picture, 'not a readable picture'),
    '16-bit picture': (picture_(np.zeros((60, 80), np.uint16)), 'expected 8 bits'),
}
BAD_NUMBERS = {
    'torn npz': (
        lambda folder: (folder / 'flame_param/00000.npz').write_bytes(b'PK\3\4'),
        'not a readable npz',
    ),
    'a pickle': (only_(expr=np.array([{}], object)), 'not a readable npz'),
    'no names': (only_(neck=np.zeros(3)), 'it lacks'),
    'dynamic offset': (
        more_(dynamic_offset=np.ones((1, 5065, 3))),
        'dynamic_offset is not zero',
    ),
    'other mesh': (more_(static_offset=np.zeros((1, 5143, 3))), 'is for 5143 vertices'),
    'too many directions': (
        more_(expr=np.eye(100)[70:71]),
        'expr has 71 numbers, open head has 52',
    ),
    'all steps in one': (
        more_(rotation=np.zeros((2, 3))),
        r'rotation should be \(1,3\), one time step',
    ),
    'NaN': (more_(jaw_pose=np.full((1, 3), np.nan)), 'jaw_pose should hold finite'),
    'text': (more_(shape=np.array(['a'])), 'shape should hold finite'),
}
BAD = BAD_TABLE | BAD_CAMERA | BAD_PICTURES | BAD_NUMBERS


@pytest.mark.parametrize('what', BAD)
def test_damage_is_named(tmp_path, head, what):
    by_hand(tmp_path, head, steps=2)
    spoil, says = BAD[what]
    spoil(tmp_path)
    with pytest.raises(InputError, match=says) as error:
        load_vhap(tmp_path)[0]
    assert '\n' not in str(error.value)
    assert len(str(error.value)) < 500 + 5000 * ('endless' in what)


def test_nothing_to_read(tmp_path):
    (tmp_path / 'transforms_train.json').write_text(json.dumps(dict(frames=[dict(exp_path='x')])))
    (tmp_path / 'film.mp4').write_bytes(b'')
    for path, says in (
        (tmp_path, 'VHAP'),
        (tmp_path / 'no', 'no clip at'),
        (tmp_path / 'film.mp4', 'VHAP'),
    ):
        with pytest.raises(InputError, match=says):
            load_vhap(path)
    with pytest.raises(InputError, match='format should be'):
        load_vhap(tmp_path, format='insta')
    with pytest.raises(InputError, match='split should be'):
        read_vhap(tmp_path, 'all')
    with pytest.raises(InputError, match='it has transforms_train.json'):
        read_vhap(tmp_path)


def test_zero_dynamic_offset_is_fine(tmp_path, head):
    by_hand(tmp_path, head, steps=1)
    more(tmp_path, dynamic_offset=np.zeros((1, 5065, 3)))
    assert len(load_vhap(tmp_path).frames) == 1


# ---- there and back


def same(ours, theirs):
    for name in ('image', 'mask'):
        difference = getattr(ours, name) - getattr(theirs, name)
        assert difference.abs().max() <= 0.5 / 255 + 1e-6
    assert torch.allclose(ours.viewmat, theirs.viewmat, atol=1e-6)
    assert torch.equal(ours.K, theirs.K)
    assert (ours.time, ours.camera) == (theirs.time, theirs.camera)
    for name, code in ours.params.items():
        count = code.shape[-1]
        assert torch.equal(theirs.params[name][..., :count], code)
        assert not theirs.params[name][..., count:].any()


@pytest.fixture(scope='module')
def painted(tmp_path_factory, head):
    "A painted clip, and the folder it was written to."
    clip = synth.mono_clip(synth.make_person(2, head), 10, 48, seed=1, head=head)
    folder = tmp_path_factory.mktemp('painted') / 'c'
    write_vhap(clip, folder, head, show=False)
    return clip, folder


def test_round_trip_of_a_painted_clip(painted, head):
    clip, folder = painted
    back = load_vhap(folder, head)
    assert len(back) == 10
    for ours, theirs in zip(clip, back):
        same(ours, theirs)


FILES = """canonical_flame_param.npz fg_masks flame_param images transforms.json
transforms_test.json transforms_train.json transforms_val.json""".split()
ENTRY = """timestep_index timestep_index_original timestep_id camera_index camera_id cx cy fl_x fl_y
h w camera_angle_x camera_angle_y transform_matrix file_path fg_mask_path
flame_param_path""".split()
TOP = """cx cy fl_x fl_y h w camera_angle_x camera_angle_y timestep_indices camera_indices frames
head head_name content""".split()


def test_what_a_written_folder_holds(painted):
    folder = painted[1]
    assert sorted(path.name for path in folder.iterdir()) == FILES
    top = json.loads((folder / 'transforms.json').read_text())
    assert set(top) == set(TOP)
    assert top['timestep_indices'] == list(range(10))
    assert top['camera_indices'] == [0]
    entry = top['frames'][3]
    assert set(entry) == set(ENTRY)
    assert entry['file_path'] == 'images/00003_00.png'
    assert entry['fg_mask_path'] == 'fg_masks/00003_00.png'
    assert entry['flame_param_path'] == 'flame_param/00003.npz'
    assert math.isclose(entry['camera_angle_x'], 2 * math.atan(24 / entry['fl_x']))


def test_what_a_file_of_parameters_holds(painted, head):
    with np.load(painted[1] / 'flame_param/00003.npz') as arrays:
        shapes = {name: arrays[name].shape for name in arrays}
    assert shapes == dict(
        translation=(1, 3),
        rotation=(1, 3),
        neck_pose=(1, 3),
        jaw_pose=(1, 3),
        eyes_pose=(1, 6),
        shape=(300,),
        expr=(1, 100),
        static_offset=(1, head.num_verts, 3),
    )


@pytest.mark.parametrize(
    'steps,cameras,sizes',
    [
        (10, 16, (105, 7, 48)),
        (10, 1, (7, 0, 3)),
        (3, 4, (12, 0, 0)),
        (1, 1, (1, 0, 0)),
        (20, 9, (112, 14, 54)),
    ],
)
def test_split_of_the_format(tmp_path, steps, cameras, sizes):
    places = [(step, f'c{camera}') for step in range(steps) for camera in range(cameras)]
    write_vhap([frame(*place, 2, 2) for place in places], tmp_path)

    def entries(part):
        return json.loads((tmp_path / f'transforms_{part}.json').read_text())['frames']

    parts = [entries(part) for part in ('train', 'val', 'test')]
    assert tuple(map(len, parts)) == sizes
    assert all(entry['camera_index'] == 8 for entry in parts[1])
    held = set(range(math.ceil(round(0.7 * steps, 6)), steps))
    assert {entry['timestep_index'] for entry in parts[2]} == held


def test_camera_by_camera(tmp_path):
    "Frames may come in any order; time steps are numbered as they come, files sorted."
    write_vhap([frame(time, camera) for camera in ('left', 'right') for time in (30, 40)], tmp_path)
    places = [(f.time, f.camera) for f in read_vhap(tmp_path)]
    assert places == [(0, 'left'), (0, 'right'), (1, 'left'), (1, 'right')]
    entries = json.loads((tmp_path / 'transforms.json').read_text())['frames']
    assert [entry['timestep_index_original'] for entry in entries] == [30, 30, 40, 40]


def test_offset_survives(tmp_path, head):
    f = frame(static_offset=torch.randn(1, head.num_verts, 3) * 0.01)
    write_vhap([f], tmp_path)
    same(f, read_vhap(tmp_path)[0])


@pytest.mark.parametrize(
    'frames,says',
    [
        ([], 'empty'),
        ([frame(0), frame(0)], 'two frames have time 0'),
        ([frame(0, 'a', jaw=torch.zeros(1, 3)), frame(0, 'b', jaw=torch.ones(1, 3))], 'disagree'),
        ([frame(betas=torch.zeros(1, 3))], "got 'betas'"),
        ([frame(jaw=torch.zeros(2, 3))], 'jaw should be'),
        ([frame(jaw=torch.full((1, 3), torch.nan))], 'finite'),
        ([frame(static_offset=torch.zeros(1, 7, 3))], 'one row per vertex'),
    ],
)
def test_writer_refuses(tmp_path, frames, says):
    with pytest.raises(InputError, match=says):
        write_vhap(frames, tmp_path / 'x')
    assert not (tmp_path / 'x/transforms.json').exists()


def test_writer_spares_what_is_there(tmp_path):
    (tmp_path / 'diary.txt').write_text('mine')
    with pytest.raises(InputError, match='not empty'):
        write_vhap([frame()], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['diary.txt']
    with pytest.raises(InputError, match='stands|not empty'):
        write_vhap([frame()], tmp_path / 'diary.txt')


def eight(upto=8, seed=0):
    "A clip of eight frames whose maker fails after some of them."

    def make(i):
        if i >= upto:
            raise RuntimeError('the light went out')
        return frame(i + seed)

    return Clip(make, 8)


@pytest.fixture
def half(tmp_path):
    "A folder that was interrupted after five frames, with a torn line, as a kill leaves it."
    with pytest.raises(RuntimeError):
        write_vhap(eight(upto=5), tmp_path)
    with (tmp_path / 'writing.jsonl').open('a') as log:
        log.write('{"timestep_index": 5, "ti')
    return tmp_path


def test_half_a_folder_is_refused(half):
    for read in (load_vhap, read_vhap):
        with pytest.raises(InputError, match='half-written'):
            read(half)
    with pytest.raises(InputError, match='another clip'):
        write_vhap(eight(seed=1), half)
    with pytest.raises(InputError, match='another clip'):
        write_vhap(eight()[:7], half)


def test_half_a_folder_goes_on(half):
    write_vhap(eight(), half)
    for ours, theirs in zip(eight(), load_vhap(half), strict=True):
        same(ours, theirs)
    assert not (half / 'writing.jsonl').exists()


def test_half_a_folder_of_a_clip_that_changes_later(half):
    "The first frames agree; the fourth has one other pixel."

    def make(i):
        made = frame(i)
        if i == 3:
            made.image[0, 0, 0] = 1 - made.image[0, 0, 0]
        return made

    with pytest.raises(InputError, match='another clip'):
        write_vhap(Clip(make, 8), half)


def named(i):
    "What `frame` is made of."
    return dict(recipe=('frame of this test', i))


KILLED = """
import sys; sys.path.insert(0, {here!r})
from test_clips import frame, Clip, write_vhap
import time
from test_clips import named
write_vhap(Clip(lambda i: (time.sleep(.02), frame(i))[1], 60, leaf=named), {folder!r})
"""


def contents(folder):
    "All files but the compressed ones, which carry a date."
    paths = [path for path in folder.rglob('*') if path.is_file() and path.suffix != '.npz']
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def test_kill_and_go_on(tmp_path):
    code = KILLED.format(here=str(Path(__file__).parent), folder=str(tmp_path / 'c'))
    job = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'OMP_NUM_THREADS': '1'})
    while len(list((tmp_path / 'c').glob('images/*.png'))) < 10 and job.poll() is None:
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (tmp_path / 'c/transforms.json').exists()
    maker = Maker()
    write_vhap(Clip(maker, 60, leaf=named), tmp_path / 'c')
    write_vhap(Clip(frame, 60, leaf=named), tmp_path / 'whole')
    assert maker.made[0] > 5
    assert contents(tmp_path / 'c') == contents(tmp_path / 'whole')


def test_another_head(tmp_path, head):
    other = Head(
        dict(
            template=head.template,
            faces=head.faces,
            shape_basis=head.shape_basis,
            expr_basis=head.expr_basis.flip(0),
            name='a cousin',
        )
    ).requires_grad_(False)
    own = head_fingerprint(head)
    assert head_fingerprint(other) != own == head_fingerprint(head.to(torch.float64))
    write_vhap([frame()], tmp_path, other)
    with pytest.raises(InputError, match='made on a cousin.*not on open head'):
        load_vhap(tmp_path)
    assert len(load_vhap(tmp_path, other)) == 1


def test_reading_is_lazy(tmp_path):
    write_vhap([frame(time) for time in range(5)], tmp_path)
    clip = load_vhap(tmp_path)
    for step in range(4):
        (tmp_path / f'images/{step:05d}_00.png').unlink()
    assert clip[2:][-1].time == 4
    with pytest.raises(InputError, match='not a readable picture'):
        clip[0]


# ---- heads in FLAME's format


@pytest.fixture
def releases(tmp_path):
    "Two releases with one mesh and other expressions."
    import flame_files as ff

    from spatialavatar0.head.flame_files import load_flame

    early = ff.model()
    late = dict(early, shapedirs=early['shapedirs'].copy())
    late['shapedirs'][:, :, 300:] *= -1
    models = dict(early=early, late=late)
    paths = {
        name: ff.write_original(tmp_path / f'{name}.pkl', model) for name, model in models.items()
    }
    return [load_flame(path, release=name) for name, path in paths.items()]


def random_frame():
    generator = torch.Generator().manual_seed(0)
    return frame(
        shape=torch.randn(1, 300, generator=generator),
        expr=torch.randn(1, 100, generator=generator),
        neck=torch.randn(1, 3, generator=generator),
        static_offset=torch.randn(1, 60, 3, generator=generator),
    )


def test_heads_in_flames_format(tmp_path, releases):
    early, late = releases
    f = random_frame()
    write_vhap([f], tmp_path / 'c', early)
    back = load_vhap(tmp_path / 'c', early)[0]
    same(f, back)
    assert torch.equal(early(**back.params), early(**f.params))
    for other in (late, open_head()):
        with pytest.raises(InputError, match='was made on'):
            load_vhap(tmp_path / 'c', other)


def test_a_folder_from_elsewhere(tmp_path, releases):
    "It says nothing of its head; sizes must do."
    from spatialavatar0.head.flame_files import load_flame

    write_vhap([random_frame()], tmp_path / 'c', releases[0])
    edit(tmp_path / 'c', lambda top: top.pop('head'))
    smaller = load_flame(tmp_path / 'early.pkl', num_shape=20, num_expr=100)
    with pytest.raises(InputError, match='300 numbers, .* has 20 directions'):
        load_vhap(tmp_path / 'c', smaller)[0]
    with pytest.raises(InputError, match='open head'):
        load_vhap(tmp_path / 'c')[0]
