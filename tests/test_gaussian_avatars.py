"""Avatars of GaussianAvatars: there and back, other heads, damaged files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_viewer import flame_like
from torch.nn.functional import normalize

from spatialavatar0.avatar.avatar import new_avatar
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


def test_nothing_is_written_for_a_broken_avatar(avatar, tmp_path):
    sick = replace(avatar, splats=dict(avatar.splats, sh0=avatar.splats['sh0'] * np.nan))
    with pytest.raises(InputError, match='sh0 hold nan'):
        write_gaussian_avatar(sick, tmp_path / 'x')
    assert not list((tmp_path / 'x').glob('*'))


def test_columns():
    assert len(BOUND_PLY_COLUMNS) == 63
