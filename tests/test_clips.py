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


def frame(t=0, camera='0', h=12, w=16, **params):
    g = torch.Generator().manual_seed(1000 + t)
    return Frame(
        torch.rand(h, w, 3, generator=g),
        torch.rand(h, w, generator=g),
        orbit(10 * t, 5, 0.6),
        intrinsics(30.0, w, h),
        params,
        t,
        camera,
    )


# ---- a clip


def test_slices_make_nothing():
    made = []
    clip = Clip(lambda i: (made.append(i), frame(i))[1], 1000)
    part = clip[900:][::10][[0, -1]]
    train, test = split(clip, blocks=5)
    assert made == []
    assert (len(part), len(train), len(test)) == (2, 800, 200)
    assert part[1].time == 990 and made == [990]
    assert [f.time for f in test[:2]] == [160, 161]


def test_cache_keeps_so_many():
    made = []
    clip = Clip(lambda i: (made.append(i), frame(i))[1], 10, cache=2)
    clip[0]
    clip[1]
    clip[0]
    clip[2]
    clip[0]
    clip[1]
    assert made == [0, 1, 2, 1]


def test_any_source():
    class Odd:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return frame(7 * i)

    for source in (
        Odd(),
        [frame(0), frame(7), frame(14)],
        (frame(7 * i) for i in range(3)),
        Clip(Odd()),
    ):
        c = Clip(source)
        assert [f.time for f in c] == [0, 7, 14]
        assert [f.time for f in c.frames] == [0, 7, 14]
        assert c[-1].time == c[np.int64(2)].time == 14
    with pytest.raises(IndexError):
        Clip(Odd())[3]
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
    f = frame(
        shape=torch.zeros(1, 100),
        static_offset=torch.zeros(1, head.num_verts, 3),
        jaw=torch.zeros(1, 3),
    )
    assert set(f.pose) == {'jaw'}


# ---- a folder made by hand, from the format's description alone


def by_hand(folder, head, T=4, cameras=1, offset=None, up='', **entry):
    """A VHAP folder written without the writer. The head hangs 90 degrees over to its side; a white
    pixel is painted where its nose must be."""
    rest = head.template.double().numpy()
    joint = (head.J_regressor.double() @ head.template.double())[0].numpy()
    skin = head.parts.numpy() == head.part_names.index('skin')
    nose = np.unique(head.faces.numpy()[skin])
    nose = nose[rest[nose, 2].argmax()]
    p = rest[nose] - joint
    p = (
        np.array([-p[1], p[0], p[2]]) + joint + [0.01, 0.02, 0.03]
    )  # a quarter turn about z: x -> y, y -> -x; then the translation
    eye = np.array([-0.051, -0.06, 0.6])
    d = p - eye  # an OpenGL camera without rotation looks along -z
    u = 200 * d[0] / -d[2] + 37
    v = 33 - 180 * d[1] / -d[2]  # rows count downwards
    for name in ('images', 'fg_masks', 'flame_param'):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shape = np.zeros(300, np.float32)
    frames = []
    for t in range(T):
        a = dict(
            translation=[[0.01, 0.02, 0.03]],
            rotation=[[0, 0, math.pi / 2]],
            neck_pose=[[0, 0, 0]],
            jaw_pose=[[0.1 * t, 0, 0]],
            eyes_pose=[[0, 0.1, 0, 0, 0.2, 0]],
            expr=np.zeros((1, 100)),
        )
        a = {k: np.array(x, np.float32) for k, x in a.items()}
        a.update(
            shape=shape,
            static_offset=np.zeros((1, head.num_verts, 3), np.float32)
            if offset is None
            else offset,
        )
        np.savez(folder / f'flame_param/{t:05d}.npz', **a)
        assert 0 < u < 80 and 0 < v < 60
        for c in range(cameras):
            image = np.zeros((60, 80, 3), np.uint8)
            image[int(v), int(u)] = 255
            mask = np.full((60, 80), 51 * t, np.uint8)
            Image.fromarray(image).save(folder / f'images/{t:05d}_{c:02d}.png')
            Image.fromarray(mask).save(folder / f'fg_masks/{t:05d}_{c:02d}.png')
            frames.append(
                {
                    **dict(
                        timestep_index=t,
                        timestep_index_original=10 * t,
                        timestep_id=f'{10 * t:05d}',
                        camera_index=c,
                        camera_id=f'cam{c}',
                        cx=37.0,
                        cy=33.0,
                        fl_x=200.0,
                        fl_y=180.0,
                        h=60,
                        w=80,
                        camera_angle_x=2 * math.atan(0.2),
                        camera_angle_y=2 * math.atan(1 / 6),
                        transform_matrix=[
                            [1, 0, 0, -0.051],
                            [0, 1, 0, -0.06],
                            [0, 0, 1, 0.6],
                            [0, 0, 0, 1],
                        ],
                        file_path=f'{up}images/{t:05d}_{c:02d}.png',
                        fg_mask_path=f'{up}fg_masks/{t:05d}_{c:02d}.png',
                        flame_param_path=f'{up}flame_param/{t:05d}.npz',
                    ),
                    **entry,
                }
            )
    np.savez(folder / 'canonical_flame_param.npz', shape=shape)
    cut = math.ceil(0.7 * T)
    for name, some in (
        ('', frames),
        ('_train', [f for f in frames if f['timestep_index'] < cut]),
        ('_val', []),
        ('_test', [f for f in frames if f['timestep_index'] >= cut]),
    ):
        top = {
            k: frames[0][k]
            for k in ('cx', 'cy', 'fl_x', 'fl_y', 'h', 'w', 'camera_angle_x', 'camera_angle_y')
            if k in frames[0]
        }
        (folder / f'transforms{name}.json').write_text(
            json.dumps(
                dict(
                    top,
                    timestep_indices=list(range(T)),
                    camera_indices=list(range(cameras)),
                    frames=some,
                )
            )
        )
    return int(nose), frames


def edit(folder, change, name='transforms.json'):
    top = json.loads((folder / name).read_text())
    change(top)
    (folder / name).write_text(json.dumps(top))


def test_golden(tmp_path, head):
    nose, _ = by_hand(tmp_path, head)
    clip = load_vhap(tmp_path)
    assert [len(read_vhap(tmp_path, s)) for s in (None, 'train', 'val', 'test')] == [4, 3, 0, 1]
    for t, f in enumerate(clip):
        uv, depth = project(head(**f.params)[0][nose], f.viewmat, f.K)
        assert f.image[int(uv[1]), int(uv[0])].min() == 1
        assert f.image.sum() == 3
        assert 0.3 < depth < 0.6
        assert f.image.shape == (60, 80, 3)
        assert torch.allclose(f.mask, torch.tensor(0.2 * t))
        assert (f.time, f.camera) == (t, 'cam0')
        assert torch.equal(f.K, torch.tensor([[200.0, 0, 37], [0, 180, 33], [0, 0, 1]]))
        assert torch.allclose(f.params['jaw'], torch.tensor([[0.1 * t, 0, 0]]))
        assert torch.allclose(f.params['eyes'], torch.tensor([[0, 0.1, 0, 0, 0.2, 0]]))
        assert f.params['shape'].shape == (1, 100)
        assert f.params['expr'].shape == (1, 52)
        assert 'static_offset' not in f.params


def test_offset_is_the_persons(tmp_path, head):
    offset = np.random.default_rng(0).normal(0, 0.01, (1, head.num_verts, 3)).astype(np.float32)
    by_hand(tmp_path, head, T=1, offset=offset)
    f = load_vhap(tmp_path)[0]
    assert np.array_equal(f.params['static_offset'].numpy(), offset)
    assert 'static_offset' not in f.pose
    still = {
        k: v
        for k, v in f.params.items()
        if k not in ('rotation', 'translation', 'jaw', 'eyes', 'neck')
    }
    assert torch.allclose(head(**still)[0], head.template + torch.from_numpy(offset[0]), atol=1e-6)


def test_union_of_sequences(tmp_path, head):
    by_hand(tmp_path / 'EMO-1', head, T=2)
    by_hand(tmp_path / 'union', head, T=2, up='../EMO-1/')
    for d in ('images', 'fg_masks', 'flame_param'):
        for p in (tmp_path / 'union' / d).iterdir():
            p.unlink()
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
    by_hand(tmp_path / 'a/b', head, T=1, **{key: path})
    with pytest.raises(InputError, match='leads out|expected a path'):
        read_vhap(tmp_path / 'a/b')


def test_camera_defaults(tmp_path, head):
    by_hand(tmp_path, head, T=1)

    def strip(top):
        for d in (top, *top['frames']):
            for k in ('fl_x', 'fl_y', 'cx', 'cy'):
                d.pop(k)

    edit(tmp_path, strip)
    assert torch.allclose(
        load_vhap(tmp_path)[0].K, torch.tensor([[200.0, 0, 40], [0, 200, 30], [0, 0, 1]])
    )


def test_matte_from_alpha_or_nowhere(tmp_path, head):
    by_hand(tmp_path, head, T=1, fg_mask_path=None)
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


BAD = {
    'not JSON': (lambda d: (d / 'transforms.json').write_text('{"frames": ['), 'not readable JSON'),
    'a list': (
        lambda d: (d / 'transforms.json').write_text('[]'),
        'an object with a list of frames',
    ),
    'no frames': (lambda d: edit(d, lambda t: t.update(frames=[])), 'no frames'),
    'a frame is null': (
        lambda d: edit(d, lambda t: t.update(frames=[None])),
        'frame 0 should be an object',
    ),
    'no params': (
        lambda d: edit(d, lambda t: t['frames'][1].pop('flame_param_path')),
        'frame 1 has no flame_param_path',
    ),
    'no matrix': (
        lambda d: edit(d, lambda t: t['frames'][1].pop('transform_matrix')),
        'frame 1: its camera cannot be read',
    ),
    'ragged matrix': (
        lambda d: edit(d, lambda t: t['frames'][0].update(transform_matrix=[[1, 0], [0]])),
        'its camera cannot be read',
    ),
    '3 x 4 matrix': (
        lambda d: edit(d, lambda t: t['frames'][0]['transform_matrix'].pop()),
        '4 x 4',
    ),
    'mirrored matrix': (
        lambda d: edit(
            d, lambda t: t['frames'][0].update(transform_matrix=np.diag([-1.0, 1, 1, 1]).tolist())
        ),
        'with a rotation',
    ),
    'scaled matrix': (
        lambda d: edit(
            d, lambda t: t['frames'][0].update(transform_matrix=np.diag([4.0, 4, 4, 1]).tolist())
        ),
        'with a rotation',
    ),
    'NaN in a matrix': (
        lambda d: edit(d, lambda t: t['frames'][0]['transform_matrix'][0].__setitem__(3, math.nan)),
        'with a rotation',
    ),
    'last row 0': (
        lambda d: edit(
            d, lambda t: t['frames'][0]['transform_matrix'].__setitem__(3, [0, 0, 0, 0])
        ),
        'with a rotation',
    ),
    'endless width': (
        lambda d: edit(d, lambda t: t['frames'][0].update(w=math.inf)),
        'cannot be read',
    ),
    'endless name': (
        lambda d: edit(d, lambda t: t['frames'][0].update(fg_mask_path='x' * 5000)),
        '1 of 6 files',
    ),
    'focal 0': (lambda d: edit(d, lambda t: t['frames'][0].update(fl_x=0)), 'should be positive'),
    'half a step': (
        lambda d: edit(d, lambda t: t['frames'][0].update(timestep_index=0.5)),
        'whole number',
    ),
    'width': (
        lambda d: edit(d, lambda t: t['frames'][0].update(w=81)),
        '80 x 60 pixels, transforms.json says 81 x 60',
    ),
    'another head': (lambda d: edit(d, lambda t: t.update(head='0' * 16)), 'made on another head'),
    'small matte': (
        lambda d: Image.new('L', (40, 30)).save(d / 'fg_masks/00000_00.png'),
        '40 x 30 pixels',
    ),
    'a missing picture': (
        lambda d: (d / 'images/00001_00.png').unlink(),
        '1 of 6 files are missing.*00001_00.png',
    ),
    'torn picture': (
        lambda d: (d / 'images/00000_00.png').write_bytes(
            (d / 'images/00000_00.png').read_bytes()[:70]
        ),
        'not a readable picture',
    ),
    '16-bit picture': (
        lambda d: Image.fromarray(np.zeros((60, 80), np.uint16)).save(d / 'images/00000_00.png'),
        'expected 8 bits',
    ),
    'torn npz': (
        lambda d: (d / 'flame_param/00000.npz').write_bytes(b'PK\3\4'),
        'not a readable npz',
    ),
    'a pickle': (
        lambda d: np.savez(d / 'flame_param/00000.npz', expr=np.array([{}], object)),
        'not a readable npz',
    ),
    'no names': (lambda d: np.savez(d / 'flame_param/00000.npz', neck=np.zeros(3)), 'it lacks'),
    'dynamic offset': (
        lambda d: more(d, dynamic_offset=np.ones((1, 5065, 3))),
        'dynamic_offset is not zero',
    ),
    'other mesh': (lambda d: more(d, static_offset=np.zeros((1, 5143, 3))), 'is for 5143 vertices'),
    'too many directions': (
        lambda d: more(d, expr=np.eye(100)[70:71]),
        'expr has 71 numbers, open head has 52',
    ),
    'all steps in one': (
        lambda d: more(d, rotation=np.zeros((2, 3))),
        r'rotation should be \(1,3\), one time step',
    ),
    'NaN': (lambda d: more(d, jaw_pose=np.full((1, 3), np.nan)), 'jaw_pose should hold finite'),
    'text': (lambda d: more(d, shape=np.array(['a'])), 'shape should hold finite'),
}


def more(d, **arrays):
    with np.load(d / 'flame_param/00000.npz') as z:
        np.savez(d / 'flame_param/00000.npz', **{**z, **arrays})


@pytest.mark.parametrize('what', BAD)
def test_damage_is_named(tmp_path, head, what):
    by_hand(tmp_path, head, T=2)
    spoil, says = BAD[what]
    spoil(tmp_path)
    with pytest.raises(InputError, match=says) as e:
        load_vhap(tmp_path)[0]
    assert '\n' not in str(e.value)
    assert len(str(e.value)) < 500 + 5000 * ('endless' in what)


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
    by_hand(tmp_path, head, T=1)
    more(tmp_path, dynamic_offset=np.zeros((1, 5065, 3)))
    assert len(load_vhap(tmp_path).frames) == 1


# ---- there and back


def same(a, b):
    for k in ('image', 'mask'):
        assert (getattr(a, k) - getattr(b, k)).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.allclose(a.viewmat, b.viewmat, atol=1e-6)
    assert torch.equal(a.K, b.K)
    assert (a.time, a.camera) == (b.time, b.camera)
    for k, x in a.params.items():
        n = x.shape[-1]
        assert torch.equal(b.params[k][..., :n], x)
        assert not b.params[k][..., n:].any()


def test_round_trip_of_a_painted_clip(tmp_path, head):
    clip = synth.mono_clip(synth.make_person(2, head), 10, 48, seed=1, head=head)
    write_vhap(clip, tmp_path / 'c', head, show=False)
    back = load_vhap(tmp_path / 'c', head)
    assert len(back) == 10
    for a, b in zip(clip, back):
        same(a, b)
    assert sorted(p.name for p in (tmp_path / 'c').iterdir()) == [
        'canonical_flame_param.npz',
        'fg_masks',
        'flame_param',
        'images',
        'transforms.json',
        'transforms_test.json',
        'transforms_train.json',
        'transforms_val.json',
    ]
    top = json.loads((tmp_path / 'c/transforms.json').read_text())
    e = top['frames'][3]
    keys = set(
        (
            'timestep_index timestep_index_original timestep_id camera_index camera_id cx cy fl_x '
            'fl_y h w camera_angle_x camera_angle_y transform_matrix file_path fg_mask_path flame_param_path'
        ).split()
    )
    assert set(e) == keys
    assert (e['file_path'], e['fg_mask_path'], e['flame_param_path']) == (
        'images/00003_00.png',
        'fg_masks/00003_00.png',
        'flame_param/00003.npz',
    )
    assert set(top) == {
        'cx',
        'cy',
        'fl_x',
        'fl_y',
        'h',
        'w',
        'camera_angle_x',
        'camera_angle_y',
        'timestep_indices',
        'camera_indices',
        'frames',
        'head',
        'head_name',
    }
    assert top['timestep_indices'] == list(range(10))
    assert top['camera_indices'] == [0]
    assert math.isclose(e['camera_angle_x'], 2 * math.atan(24 / e['fl_x']))
    with np.load(tmp_path / 'c/flame_param/00003.npz') as z:
        shapes = {k: z[k].shape for k in z}
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
    'T,cameras,sizes',
    [
        (10, 16, (105, 7, 48)),
        (10, 1, (7, 0, 3)),
        (3, 4, (12, 0, 0)),
        (1, 1, (1, 0, 0)),
        (20, 9, (112, 14, 54)),
    ],
)
def test_split_of_the_format(tmp_path, T, cameras, sizes):
    write_vhap([frame(t, f'c{c}', 2, 2) for t in range(T) for c in range(cameras)], tmp_path)
    got = [
        json.loads((tmp_path / f'transforms_{s}.json').read_text())['frames']
        for s in ('train', 'val', 'test')
    ]
    assert tuple(map(len, got)) == sizes
    assert all(e['camera_index'] == 8 for e in got[1])
    assert {e['timestep_index'] for e in got[2]} == set(range(math.ceil(round(0.7 * T, 6)), T))


def test_camera_by_camera(tmp_path):
    "Frames may come in any order; time steps are numbered as they come, files sorted."
    write_vhap([frame(t, c) for c in ('left', 'right') for t in (30, 40)], tmp_path)
    back = read_vhap(tmp_path)
    assert [(f.time, f.camera) for f in back] == [
        (0, 'left'),
        (0, 'right'),
        (1, 'left'),
        (1, 'right'),
    ]
    assert [
        e['timestep_index_original']
        for e in json.loads((tmp_path / 'transforms.json').read_text())['frames']
    ] == [30, 30, 40, 40]


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
    assert [p.name for p in tmp_path.iterdir()] == ['diary.txt']
    with pytest.raises(InputError, match='stands|not empty'):
        write_vhap([frame()], tmp_path / 'diary.txt')


def test_half_a_folder(tmp_path):
    def upto(n, seed=0):
        def make(i):
            if i >= n:
                raise RuntimeError('the light went out')
            return frame(i + seed)

        return Clip(make, 8)

    with pytest.raises(RuntimeError):
        write_vhap(upto(5), tmp_path)
    with (tmp_path / 'writing.jsonl').open('a') as f:
        f.write('{"timestep_index": 5, "ti')  # a torn line, as a kill leaves it
    for f in (load_vhap, read_vhap):
        with pytest.raises(InputError, match='half-written'):
            f(tmp_path)
    with pytest.raises(InputError, match='another clip'):
        write_vhap(upto(8, seed=1), tmp_path)
    with pytest.raises(InputError, match='another clip'):
        write_vhap(upto(8)[:7], tmp_path)
    write_vhap(upto(8), tmp_path)
    for a, b in zip(upto(8), load_vhap(tmp_path), strict=True):
        same(a, b)
    assert not (tmp_path / 'writing.jsonl').exists()


KILLED = """
import sys; sys.path.insert(0, {here!r})
from test_clips import frame, Clip, write_vhap
import time
write_vhap(Clip(lambda i: (time.sleep(.02), frame(i))[1], 60), {folder!r})
"""


def test_kill_and_go_on(tmp_path):
    code = KILLED.format(here=str(Path(__file__).parent), folder=str(tmp_path / 'c'))
    job = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'OMP_NUM_THREADS': '1'})
    while len(list((tmp_path / 'c').glob('images/*.png'))) < 10 and job.poll() is None:
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (tmp_path / 'c/transforms.json').exists()
    made = []
    write_vhap(Clip(lambda i: (made.append(i), frame(i))[1], 60), tmp_path / 'c')
    write_vhap(Clip(frame, 60), tmp_path / 'whole')

    def files(d):
        return {
            p.relative_to(d): p.read_bytes()
            for p in d.rglob('*')
            if p.is_file() and p.suffix != '.npz'
        }

    assert made[0] == 0
    assert made[1] > 5
    assert files(tmp_path / 'c') == files(tmp_path / 'whole')


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
    assert (
        head_fingerprint(other)
        != head_fingerprint(head)
        == head_fingerprint(head.to(torch.float64))
    )
    write_vhap([frame()], tmp_path, other)
    with pytest.raises(InputError, match='made on a cousin.*not on open head'):
        load_vhap(tmp_path)
    assert len(load_vhap(tmp_path, other)) == 1


def test_reading_is_lazy(tmp_path):
    write_vhap([frame(t) for t in range(5)], tmp_path)
    clip = load_vhap(tmp_path)
    for t in range(4):
        (tmp_path / f'images/{t:05d}_00.png').unlink()
    assert clip[2:][-1].time == 4
    with pytest.raises(InputError, match='not a readable picture'):
        clip[0]


def test_heads_in_flames_format(tmp_path):
    """Two releases with one mesh and other expressions; the open head; a file cut to fewer
    directions."""
    import flame_files as ff

    from spatialavatar0.head.flame_files import load_flame

    m = ff.model()
    late = dict(m, shapedirs=m['shapedirs'].copy())
    late['shapedirs'][:, :, 300:] *= -1
    a, b = (
        load_flame(ff.write_original(tmp_path / f'{n}.pkl', x), release=n)
        for n, x in (('early', m), ('late', late))
    )
    g = torch.Generator().manual_seed(0)
    f = frame(
        shape=torch.randn(1, 300, generator=g),
        expr=torch.randn(1, 100, generator=g),
        neck=torch.randn(1, 3, generator=g),
        static_offset=torch.randn(1, 60, 3, generator=g),
    )
    write_vhap([f], tmp_path / 'c', a)
    same(f, load_vhap(tmp_path / 'c', a)[0])
    assert torch.equal(a(**load_vhap(tmp_path / 'c', a)[0].params), a(**f.params))
    for other in (b, open_head()):
        with pytest.raises(InputError, match='was made on'):
            load_vhap(tmp_path / 'c', other)
    edit(
        tmp_path / 'c', lambda top: top.pop('head')
    )  # a folder from elsewhere says nothing; sizes must do
    with pytest.raises(InputError, match='300 numbers, .* has 20 directions'):
        load_vhap(tmp_path / 'c', load_flame(tmp_path / 'early.pkl', num_shape=20, num_expr=100))[0]
    with pytest.raises(InputError, match='open head'):
        load_vhap(tmp_path / 'c')[0]
