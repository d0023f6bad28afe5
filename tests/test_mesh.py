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


def plane(z=2.0):
    "A square of 2 m at depth z, facing the camera."
    return torch.tensor([[-1.0, -1, z], [1, -1, z], [1, 1, z], [-1, 1, z]]), torch.tensor(
        [[0, 2, 1], [0, 3, 2]]
    )


K = torch.tensor([[40.0, 0, 30], [0, 40.0, 20], [0, 0, 1]])


def test_mesh_is_perspective_correct():
    v, f = plane()
    v = v @ torch.tensor([[0.6, 0, 0.8], [0, 1, 0], [-0.8, 0, 0.6]]) + torch.tensor(
        [0.0, 0, 2.5]
    )  # a tilted square
    ids, bary, depth = rasterize_mesh(v, f, torch.eye(4), K, 60, 40)
    p = interpolate(v, f, ids, bary)
    y, x = (ids >= 0).nonzero().T
    p = p[y, x]
    q = p @ K.T
    q = q[:, :2] / q[:, 2:]
    assert len(y) > 100
    assert (q - torch.stack([x, y], -1) - 0.5).abs().max() < 1e-3
    assert (p[:, 2] - depth[y, x]).abs().max() < 1e-5
    assert (bary.sum(-1)[ids >= 0] - 1).abs().max() < 1e-5
    assert torch.isinf(depth[ids < 0]).all()


def test_mesh_has_no_cracks_and_nearest_wins():
    v, f = plane()
    near = v * torch.tensor([0.25, 0.25, 0.5])
    ids, _, depth = rasterize_mesh(
        torch.cat([v, near]), torch.cat([f, f + 4]), torch.eye(4), K, 60, 40
    )
    assert (ids >= 0)[1:-1, 11:-11].all()
    assert depth[20, 30] == 1
    assert depth[20, 15] == 2


def test_normals_and_visibility():
    v, f = plane()
    assert torch.allclose(vertex_normals(v, f), torch.tensor([0.0, 0, -1]).expand(4, 3))
    _, _, depth = rasterize_mesh(v, f, torch.eye(4), K, 60, 40)
    pts = torch.tensor([[0.0, 0, 1], [0, 0, 2.004], [0, 0, 2.1], [5, 0, 2], [0, 0, -1]])
    assert visible_points(pts, depth, torch.eye(4), K).tolist() == [True, True, False, False, False]


def test_mesh_bad_input():
    v, f = plane()
    with pytest.raises(InputError, match='faces'):
        rasterize_mesh(v, f + 1, torch.eye(4), K, 60, 40)
    with pytest.raises(InputError, match='verts'):
        shade_mesh(v * float('nan'), f, torch.eye(4), K, 60, 40)
    with pytest.raises(InputError, match='viewmat'):
        rasterize_mesh(v, f, torch.eye(4)[None], K, 60, 40)
