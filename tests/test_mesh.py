"The z-buffer: perspective, cracks, hiding, bad input."

import pytest
import torch

from spatialavatar0.ground.core import InputError
from spatialavatar0.splats.mesh import (
    interpolate,
    rasterize_mesh,
    shade_mesh,
    vertex_normals,
    visible_points,
)

K = torch.tensor([[40.0, 0, 30], [0, 40.0, 20], [0, 0, 1]])
CAMERA = torch.eye(4), K, 60, 40


def square(z=2.0):
    "A square of 2 m at depth z, facing the camera: vertices, faces."
    verts = torch.tensor([[-1.0, -1, z], [1, -1, z], [1, 1, z], [-1, 1, z]])
    return verts, torch.tensor([[0, 2, 1], [0, 3, 2]])


def test_mesh_is_perspective_correct():
    verts, faces = square()
    tilt = torch.tensor([[0.6, 0, 0.8], [0, 1, 0], [-0.8, 0, 0.6]])
    verts = verts @ tilt + torch.tensor([0.0, 0, 2.5])
    ids, bary, depth = rasterize_mesh(verts, faces, *CAMERA)
    row, column = (ids >= 0).nonzero().T
    points = interpolate(verts, faces, ids, bary)[row, column]
    pixels = points @ K.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    assert len(row) > 100
    assert (pixels - torch.stack([column, row], -1) - 0.5).abs().max() < 1e-3
    assert (points[:, 2] - depth[row, column]).abs().max() < 1e-5
    assert (bary.sum(-1)[ids >= 0] - 1).abs().max() < 1e-5
    assert torch.isinf(depth[ids < 0]).all()


def test_mesh_has_no_cracks_and_nearest_wins():
    verts, faces = square()
    near = verts * torch.tensor([0.25, 0.25, 0.5])
    both = torch.cat([verts, near]), torch.cat([faces, faces + 4])
    ids, _, depth = rasterize_mesh(*both, *CAMERA)
    assert (ids >= 0)[1:-1, 11:-11].all()
    assert depth[20, 30] == 1
    assert depth[20, 15] == 2


def test_normals_and_visibility():
    verts, faces = square()
    towards_us = torch.tensor([0.0, 0, -1]).expand(4, 3)
    assert torch.allclose(vertex_normals(verts, faces), towards_us)
    depth = rasterize_mesh(verts, faces, *CAMERA).depth
    points = torch.tensor([[0.0, 0, 1], [0, 0, 2.004], [0, 0, 2.1], [5, 0, 2], [0, 0, -1]])
    seen = visible_points(points, depth, torch.eye(4), K)
    assert seen.tolist() == [True, True, False, False, False]


def test_mesh_bad_input():
    verts, faces = square()
    with pytest.raises(InputError, match='faces'):
        rasterize_mesh(verts, faces + 1, *CAMERA)
    with pytest.raises(InputError, match='verts'):
        shade_mesh(verts * float('nan'), faces, *CAMERA)
    with pytest.raises(InputError, match='viewmat'):
        rasterize_mesh(verts, faces, torch.eye(4)[None], K, 60, 40)
