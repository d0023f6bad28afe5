"""Avatars of GaussianAvatars: there and back, other heads, damaged files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_viewer import flame_like
from torch.nn.functional import normalize

from spatialavatar0.avatar.avatar import load_avatar, new_avatar
from spatialavatar0.ground.core import InputError
from spatialavatar0.head.head import open_head
from spatialavatar0.use.animate import pose_of, talk
from spatialavatar0.use.gaussian_avatars import (
    BOUND_PLY_COLUMNS,
    from_centres,
    read_gaussian_avatar,
    write_gaussian_avatar,
)


@pytest.fixture(scope='module')
def avatar():
    shape = torch.randn(1, 60, generator=torch.Generator().manual_seed(0))
    avatar = new_avatar(open_head(), 48, shape)
    random = torch.Generator().manual_seed(1)
    avatar.splats = {
        name: x + 0.1 * torch.randn(x.shape, generator=random) for name, x in avatar.splats.items()
    }
    return avatar


def normalized(splats):
    return dict(splats, quats=normalize(splats['quats'], dim=-1))


def test_rest_is_exact_and_again_is_equal(avatar, tmp_path):
    once, poses = read_gaussian_avatar(write_gaussian_avatar(avatar, tmp_path / 'a'))
    assert len(poses) == 1
    for ours, theirs in zip(avatar.world(), once.world()):
        assert torch.allclose(ours, theirs, atol=2e-6)
    file = write_gaussian_avatar(once, tmp_path / 'b') / 'point_cloud.ply'
    twice, _ = read_gaussian_avatar(file)
    for name, x in normalized(once.splats).items():
        assert torch.allclose(x, twice.splats[name], atol=1e-5)
    assert torch.allclose(from_centres(once), once.splats['offsets'], atol=1e-5)


def test_motion_and_identity(avatar, tmp_path):
    motion = []
    for i, controls in enumerate(talk(9)):
        place = dict(translation=torch.tensor([[0.1, 0, i / 9]]))
        turn = dict(rotation=torch.tensor([[0, 0.3, 0]]))
        motion.append(pose_of(avatar.head, controls) | place | turn)
    back, poses = read_gaussian_avatar(write_gaussian_avatar(avatar, tmp_path / 'a', motion))
    for written, read in zip(motion, poses, strict=True):
        assert torch.allclose(avatar.verts(**written), back.verts(**read), atol=1e-6)


def test_a_head_without_names(tmp_path):
    head = flame_like()
    avatar = new_avatar(head, 24)
    back, _ = read_gaussian_avatar(write_gaussian_avatar(avatar, tmp_path), head)
    pose = dict(expr=torch.randn(1, 52), jaw=torch.tensor([[0.2, 0, 0]]))
    assert torch.allclose(avatar.verts(**pose), back.verts(**pose), atol=1e-6)


def test_offsets_of_single_frames_are_dropped_aloud(avatar, tmp_path):
    file = write_gaussian_avatar(avatar, tmp_path) / 'flame_param.npz'
    with np.load(file) as params:
        changed = dict(params, dynamic_offset=np.ones_like(params['dynamic_offset']))
    np.savez(file, **changed)
    with pytest.warns(UserWarning, match='dynamic_offset'):
        read_gaussian_avatar(tmp_path)


def test_damaged_files_never_crash(avatar, tmp_path):
    write_gaussian_avatar(avatar, tmp_path)
    rng = np.random.default_rng(0)
    files = [tmp_path / name for name in ('point_cloud.ply', 'flame_param.npz')]
    sound = {file: file.read_bytes() for file in files}
    for i in range(300):
        file = files[i % 2]
        data = bytearray(sound[file])
        for at in rng.integers(0, min(len(data), 2500), 3):
            data[at] = rng.integers(256)
        file.write_bytes(data[: rng.integers(len(data))] if i % 6 == 0 else data)
        try:
            read_gaussian_avatar(tmp_path)
        except InputError:
            pass
        file.write_bytes(sound[file])


def bound_rows(avatar, folder):
    "Header and rows of a file of ours."
    data = (write_gaussian_avatar(avatar, folder) / 'point_cloud.ply').read_bytes()
    start = data.index(b'end_header\n') + 11
    return data[:start], np.frombuffer(data[start:], '<f4').reshape(-1, 63).copy()


SPOILT = dict(  # column of the row -> value, words
    offsets=('x', np.nan, 'nan or inf'),
    far=('y', 1e6, 'offsets out of range'),
    unturned=('rot', 0.0, 'quats out of range'),
    huge=('scale_1', 50.0, 'log_scales out of range'),
    bright=('f_dc_0', 1e20, 'sh0 out of range'),
    unbound=('binding_0', np.nan, 'nan or inf'),
)


@pytest.mark.parametrize('name', SPOILT)
def test_bad_rows_are_left_out_and_counted(avatar, tmp_path, name):
    column, value, words = SPOILT[name]
    header, rows = bound_rows(avatar, tmp_path)
    rows[5, [i for i, x in enumerate(BOUND_PLY_COLUMNS) if x.startswith(column)]] = value
    (tmp_path / 'point_cloud.ply').write_bytes(header + rows.tobytes())
    with pytest.warns(UserWarning, match=f'left out 1 of {len(rows):,} splats .1 with {words}'):
        back, _ = read_gaussian_avatar(tmp_path)
    assert len(back) == len(avatar) - 1
    back.save(tmp_path / 'a.safetensors')
    assert len(load_avatar(tmp_path / 'a.safetensors')) == len(back)


def test_opaque_and_flat_rows_are_kept(avatar, tmp_path):
    header, rows = bound_rows(avatar, tmp_path)
    rows[5, BOUND_PLY_COLUMNS.index('opacity')] = np.inf
    rows[6, BOUND_PLY_COLUMNS.index('scale_2')] = -np.inf
    (tmp_path / 'point_cloud.ply').write_bytes(header + rows.tobytes())
    back, _ = read_gaussian_avatar(tmp_path)
    back.save(tmp_path / 'a.safetensors')
    assert load_avatar(tmp_path / 'a.safetensors').world()[3][5] == 1


def test_big_endian_and_text(avatar, tmp_path):
    header, rows = bound_rows(avatar, tmp_path)
    whole, _ = read_gaussian_avatar(tmp_path)
    lines = '\n'.join(' '.join(f'{value:.9g}' for value in row) for row in rows.tolist())
    forms = dict(binary_big_endian=rows.astype('>f4').tobytes(), ascii=lines.encode())
    for form, data in forms.items():
        changed = header.replace(b'binary_little_endian', form.encode()) + data
        (tmp_path / 'point_cloud.ply').write_bytes(changed)
        back, _ = read_gaussian_avatar(tmp_path)
        assert torch.equal(back.binding.face_ids, whole.binding.face_ids)
        assert all(torch.equal(x, whole.splats[name]) for name, x in back.splats.items())


PARAMS = {
    'nan': (dict(expr=np.full((1, 100), np.nan)), 'frame 0'),
    'a giant': (dict(shape=np.full(100, 1e10)), 'shape should lie in'),
    'a tail': (dict(static_offset=np.full((1, 5065, 3), 50.0)), 'static_offset should lie in'),
    'words': (dict(neck_pose=np.array([['left'] * 3])), 'numbers'),
    'no frame': (dict(expr=np.zeros((0, 100))), 'expr'),
    'a number': (dict(expr=np.float32(3)), 'expr'),
    'three axes': (dict(expr=np.zeros((1, 100, 1))), 'expr'),
}


@pytest.mark.parametrize('name', PARAMS)
def test_parameters_that_are_none(avatar, tmp_path, name):
    change, words = PARAMS[name]
    write_gaussian_avatar(avatar, tmp_path)
    with np.load(tmp_path / 'flame_param.npz') as params:
        changed = dict(params) | change
    np.savez(tmp_path / 'flame_param.npz', **changed)
    with pytest.raises(InputError, match=words):
        read_gaussian_avatar(tmp_path)


def test_nothing_is_written_for_a_broken_avatar(avatar, tmp_path):
    sick = replace(avatar, splats=dict(avatar.splats, sh0=avatar.splats['sh0'] * np.nan))
    with pytest.raises(InputError, match='sh0 hold nan'):
        write_gaussian_avatar(sick, tmp_path / 'x')
    assert not list((tmp_path / 'x').glob('*'))


def test_columns():
    assert len(BOUND_PLY_COLUMNS) == 63
