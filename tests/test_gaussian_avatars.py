"""Avatars of GaussianAvatars: there and back, other heads, damaged files."""

import numpy as np
import pytest
import torch
from spatialavatar0.avatar.avatar import new_avatar
from spatialavatar0.ground.core import InputError
from spatialavatar0.head.head import open_head
from spatialavatar0.use.animate import pose_of, talk
from spatialavatar0.use.gaussian_avatars import (
    COLUMNS,
    from_centres,
    read_gaussian_avatar,
    write_gaussian_avatar,
)
from test_viewer import flame_like


@pytest.fixture(scope='module')
def avatar():
    a = new_avatar(open_head(), 48, torch.randn(1, 60, generator=torch.Generator().manual_seed(0)))
    g = torch.Generator().manual_seed(1)
    a.splats = {k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in a.splats.items()}
    return a


def test_rest_is_exact_and_again_is_equal(avatar, tmp_path):
    b, poses = read_gaussian_avatar(write_gaussian_avatar(avatar, tmp_path / 'a'))
    assert len(poses) == 1
    for x, y in zip(avatar.world(), b.world()):
        assert torch.allclose(x, y, atol=2e-6)
    c, _ = read_gaussian_avatar(write_gaussian_avatar(b, tmp_path / 'b') / 'point_cloud.ply')
    for k in b.splats:
        assert torch.allclose(
            b.splats[k] if k != 'quats' else torch.nn.functional.normalize(b.splats[k], dim=-1),
            c.splats[k],
            atol=1e-5,
        )
    assert torch.allclose(from_centres(b), b.splats['offsets'], atol=1e-5)


def test_motion_and_identity(avatar, tmp_path):
    motion = [
        dict(
            pose_of(avatar.head, f),
            translation=torch.tensor([[0.1, 0, i / 9]]),
            rotation=torch.tensor([[0, 0.3, 0]]),
        )
        for i, f in enumerate(talk(9))
    ]
    b, poses = read_gaussian_avatar(write_gaussian_avatar(avatar, tmp_path / 'a', motion))
    for p, q in zip(motion, poses):
        assert torch.allclose(avatar.verts(**p), b.verts(**q), atol=1e-6)


def test_a_head_without_names(tmp_path):
    h = flame_like()
    a = new_avatar(h, 24)
    b, _ = read_gaussian_avatar(write_gaussian_avatar(a, tmp_path), h)
    pose = dict(expr=torch.randn(1, 52), jaw=torch.tensor([[0.2, 0, 0]]))
    assert torch.allclose(a.verts(**pose), b.verts(**pose), atol=1e-6)


def test_offsets_of_single_frames_are_dropped_aloud(avatar, tmp_path):
    write_gaussian_avatar(avatar, tmp_path)
    with np.load(tmp_path / 'flame_param.npz') as d:
        np.savez(
            tmp_path / 'flame_param.npz',
            **{**d, 'dynamic_offset': np.ones_like(d['dynamic_offset'])},
        )
    with pytest.warns(UserWarning, match='dynamic_offset'):
        read_gaussian_avatar(tmp_path)


def test_damaged_files_never_crash(avatar, tmp_path):
    write_gaussian_avatar(avatar, tmp_path)
    rng = np.random.default_rng(0)
    files = {n: (tmp_path / n).read_bytes() for n in ('point_cloud.ply', 'flame_param.npz')}
    for i in range(300):
        name = list(files)[i % 2]
        data = bytearray(files[name])
        for at in rng.integers(0, min(len(data), 2500), 3):
            data[at] = rng.integers(256)
        (tmp_path / name).write_bytes(data[: rng.integers(len(data))] if i % 6 == 0 else data)
        try:
            read_gaussian_avatar(tmp_path)
        except InputError:
            pass
        (tmp_path / name).write_bytes(files[name])


def test_nothing_is_written_for_a_broken_avatar(avatar, tmp_path):
    from dataclasses import replace

    with pytest.raises(InputError, match='sh0 hold nan'):
        write_gaussian_avatar(
            replace(avatar, splats=dict(avatar.splats, sh0=avatar.splats['sh0'] * np.nan)),
            tmp_path / 'x',
        )
    assert not list((tmp_path / 'x').glob('*'))
    assert len(COLUMNS) == 63
