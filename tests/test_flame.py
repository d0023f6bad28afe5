"FLAME's files: the original encodings, what belongs beside them, and files that mean harm."

import io
import pickle
import struct
import sys
import tracemalloc
import types
import zipfile

import flame_files as ff
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialavatar0.avatar.avatar import Avatar, head_id, new_avatar
from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import intrinsics, orbit
from spatialavatar0.ground.pickles import read_arrays, unpickle
from spatialavatar0.head.flame_files import load_flame, write_flame_folder, write_obj
from spatialavatar0.head.head import open_head
from spatialavatar0.head.teeth import add_teeth
from spatialavatar0.pictures.clips import Frame
from spatialavatar0.splats.binding import bind_uv
from spatialavatar0.splats.mesh import rasterize_mesh

SMALL = ff.model()


def poses(B=3, S=300, E=100, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(B, n, generator=g) * s
        for k, n, s in (
            ('shape', S, 1.0),
            ('expr', E, 0.5),
            ('rotation', 3, 0.5),
            ('neck', 3, 0.3),
            ('jaw', 3, 0.3),
            ('eyes', 6, 0.3),
            ('translation', 3, 0.1),
        )
    }


def smplx_verts(folder, p):
    smplx = pytest.importorskip('smplx')
    model = smplx.FLAME(
        str(folder), num_betas=300, num_expression_coeffs=100, batch_size=len(p['shape'])
    )
    return model(
        betas=p['shape'],
        expression=p['expr'],
        global_orient=p['rotation'],
        neck_pose=p['neck'],
        jaw_pose=p['jaw'],
        leye_pose=p['eyes'][:, :3],
        reye_pose=p['eyes'][:, 3:],
        transl=p['translation'],
    ).vertices.detach()


def for_smplx(folder, m):
    "The same model without chumpy, and the landmark file that smplx insists on."
    (folder / 'FLAME_NEUTRAL.pkl').write_bytes(
        pickle.dumps(dict(m, J_regressor=scipy.sparse.csc_matrix(m['J_regressor'])), 2)
    )
    (folder / 'flame_static_embedding.pkl').write_bytes(
        pickle.dumps(dict(lmk_face_idx=np.zeros(51, int), lmk_b_coords=np.full((51, 3), 1 / 3)), 2)
    )
    return folder


# ---- the original encodings


@pytest.mark.parametrize('protocol', [0, 1, 2])
@pytest.mark.parametrize('kintree', [np.uint32, np.int64])
def test_original_encodings(tmp_path, protocol, kintree):
    m = ff.model(kintree=kintree, columns=30)
    head = load_flame(
        ff.write_original(tmp_path / 'generic_model.pkl', m, protocol), num_shape=20, num_expr=10
    )
    for ours, theirs in (
        (head.template, m['v_template']),
        (head.shape_basis, m['shapedirs'][:, :, :20].transpose(2, 0, 1)),
        (head.expr_basis, m['shapedirs'][:, :, 20:].transpose(2, 0, 1)),
        (head.pose_basis, m['posedirs'].transpose(2, 0, 1)),
        (head.weights, m['weights']),
        (head.J_regressor, m['J_regressor']),
    ):
        assert torch.equal(ours, torch.as_tensor(theirs.astype(np.float32)))
    assert torch.equal(head.faces, torch.as_tensor(m['f'].astype(np.int64)))
    assert head.parents.tolist() == [-1, 0, 1, 1, 1]
    assert head.parts.bincount().tolist() == [84, 8, 8]
    assert head.masks['eyeballs'].sum() == 20


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('protocol', [0, 1, 2])
def test_fixtures_are_what_python_2_wrote(monkeypatch, protocol):
    """Python's own unpickler, with stand-ins for the classes that are gone, reads them to the same
    arrays."""
    for name, cls in (
        ('chumpy', None),
        ('chumpy.ch', 'Ch'),
        ('chumpy.reordering', 'Select'),
        ('scipy.sparse.csc', 'csc_matrix'),
    ):
        mod = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, mod)
        if cls:
            setattr(mod, cls, type(cls, (), {}))
    m = ff.model(columns=12)
    d = pickle.loads(ff.Python2(protocol).dumps(ff.original(m)), encoding='latin1')
    assert np.array_equal(d['weights'].x, m['weights'])
    assert np.array_equal(d['kintree_table'], m['kintree_table'])
    assert d['f'].dtype == np.uint32
    s = d['shapedirs']
    assert np.array_equal(s.a.x.ravel()[s.idxs].reshape(s.preferred_shape), m['shapedirs'])
    j = d['J_regressor']
    assert np.array_equal(
        scipy.sparse.csc_matrix((j.data, j.indices, j.indptr), j._shape).toarray(), m['J_regressor']
    )


@pytest.mark.parametrize('seed', [0, 1])
def test_smplx_agrees_on_fixtures(tmp_path, seed):
    m = ff.model(seed=seed, kintree=np.int64)
    p = poses(seed=seed)
    head = load_flame(ff.write_original(tmp_path / 'generic_model.pkl', m))
    assert (head(**p) - smplx_verts(for_smplx(tmp_path, m), p)).abs().max() < 1e-5


def test_flames_own_sizes(tmp_path):
    m = ff.model(5023, 9976, kintree=np.int64)
    head = load_flame(ff.write_original(tmp_path / 'flame2023.pkl', m))
    p = poses(2)
    assert (head.num_verts, len(head.faces), head.num_shape, head.num_expr, head.name) == (
        5023,
        9976,
        300,
        100,
        'FLAME 2023',
    )
    assert (head(**p) - smplx_verts(for_smplx(tmp_path, m), p)).abs().max() < 1e-5
    lips = np.arange(15), np.arange(100, 115)
    more = load_flame(tmp_path / 'flame2023.pkl', teeth=True, lips=lips, num_shape=100, num_expr=50)
    p = {**p, 'shape': p['shape'][:, :100], 'expr': p['expr'][:, :50]}
    assert (more.num_verts, len(more.faces), more.num_shape, more.num_expr) == (
        5143,
        10144,
        100,
        50,
    )
    assert torch.allclose(
        more.shape_basis[:, 5023:5038],
        (more.shape_basis[:, lips[0]] + more.shape_basis[:, lips[1]]) / 2,
        atol=1e-7,
    )
    assert torch.allclose(more(**p)[:, :5023], head(**p), atol=1e-6)
    offset = torch.randn(1, 5143, 3) * 0.001
    assert torch.allclose(more(static_offset=offset)[0] - more()[0], offset[0], atol=0.005)
    assert more(static_offset=offset).shape == (1, 5143, 3)


def test_memory(tmp_path):
    "Reading takes a few times the file, not more."
    p = ff.write_original(tmp_path / 'generic_model.pkl', ff.model(5023, 9976))
    tracemalloc.start()
    read_arrays(p)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3.5 * p.stat().st_size


# ---- other containers, other names


def test_npz(tmp_path):
    dense, odd = tmp_path / 'a.npz', tmp_path / 'b.npz'
    np.savez(dense, **SMALL)
    np.savez(odd, **dict(SMALL, J_regressor=scipy.sparse.csc_matrix(SMALL['J_regressor'])))
    a, b = load_flame(dense), load_flame(odd)
    p = poses()
    assert torch.equal(a(**p), b(**p))
    np.savez_compressed(tmp_path / 'c.npz', **SMALL)
    assert torch.equal(a(**p), load_flame(tmp_path / 'c.npz')(**p))
    (tmp_path / 'named_wrongly.pkl').write_bytes(dense.read_bytes())
    assert torch.equal(a(**p), load_flame(tmp_path / 'named_wrongly.pkl')(**p))


@pytest.mark.parametrize('protocol', range(6))
def test_pickles_of_today(tmp_path, protocol):
    (tmp_path / 'x.pkl').write_bytes(
        pickle.dumps(
            dict(SMALL, J_regressor=scipy.sparse.csr_matrix(SMALL['J_regressor'])), protocol
        )
    )
    assert torch.equal(
        load_flame(tmp_path / 'x.pkl').weights, torch.as_tensor(SMALL['weights'].astype(np.float32))
    )


@pytest.mark.parametrize(
    'name,release',
    [
        ('generic_model.pkl', 'unknown release'),
        ('FLAME2020/generic_model.pkl', 'FLAME 2020'),
        ('flame2023.pkl', 'FLAME 2023'),
        ('flame2023_no_jaw.pkl', 'no jaw'),
        ('flame2023_Open.pkl', 'FLAME 2023 Open'),
        ('FLAME_NEUTRAL.pkl', 'unknown release'),
        ('mine.npz', 'unknown release'),
    ],
)
def test_folders(tmp_path, name, release):
    (p := tmp_path / 'data' / name).parent.mkdir(parents=True)
    np.savez(p, **SMALL) if p.suffix == '.npz' else ff.write_original(p, SMALL)
    assert release in load_flame(tmp_path / 'data').name
    assert load_flame(p, release='mine').name == 'mine'


def test_two_releases_in_a_folder(tmp_path):
    for n in ('generic_model.pkl', 'flame2023.pkl'):
        ff.write_original(tmp_path / n, SMALL)
    with pytest.raises(InputError, match='several models: flame2023.pkl, generic_model.pkl'):
        load_flame(tmp_path)
    ff.write_original(tmp_path / 'FLAME_NEUTRAL.pkl', SMALL)
    assert 'FLAME_NEUTRAL' in load_flame(tmp_path).name


def test_missing(tmp_path, monkeypatch):
    monkeypatch.setenv('SPATIALAVATAR0_DATA', str(tmp_path / 'data'))
    with pytest.raises(InputError, match='no such file or folder.*flame.is.tue.mpg.de'):
        load_flame(tmp_path / 'nothing.pkl')
    with pytest.raises(
        InputError, match='holds no FLAME model.*generic_model.*flame.is.tue.mpg.de'
    ):
        load_flame(tmp_path)
    with pytest.raises(
        InputError, match='flame2023 is not here.*non-commercial.*flame.is.tue.mpg.de'
    ):
        load_flame('flame2023')
    (tmp_path / 'data' / 'flame2023').mkdir(parents=True)
    ff.write_original(tmp_path / 'data' / 'flame2023' / 'flame2023.pkl', SMALL)
    assert load_flame('flame2023').name == 'FLAME 2023'


def test_columns(tmp_path):
    p = ff.write_original(tmp_path / 'x.pkl', ff.model(columns=150))
    for kw in ({}, dict(num_shape=100), dict(num_shape=100, num_expr=100)):
        with pytest.raises(InputError, match='150 columns.*add up to 150'):
            load_flame(p, **kw)
    h = load_flame(p, num_shape=100, num_expr=50)
    assert (h.num_shape, h.num_expr) == (100, 50)
    with pytest.raises(InputError, match='ask for more'):
        load_flame(ff.write_original(tmp_path / 'y.pkl', SMALL), num_shape=301)


# ---- what lies beside the model


def test_uv(tmp_path):
    p = ff.write_original(tmp_path / 'generic_model.pkl', SMALL)
    V, F = 60, 100
    r = np.random.default_rng(0)
    assert not hasattr(load_flame(p), 'uv')
    with pytest.raises(InputError, match='no atlas.*uv='):
        bind_uv(load_flame(p), 16)
    vt = r.random((3 * F, 2))
    ft = np.arange(3 * F).reshape(F, 3)
    np.savez(tmp_path / 'uv.npz', vt=vt, ft=ft, mean=np.array([None]))
    a = load_flame(p)
    assert torch.allclose(
        a.uv[a.uv_faces],
        torch.as_tensor(np.stack([vt[ft][..., 0], 1 - vt[ft][..., 1]], -1)).float(),
    )
    write_obj(tmp_path / 'head_template_mesh.obj', a, a.template)
    b = load_flame(p)
    assert torch.allclose(a.uv[a.uv_faces], b.uv[b.uv_faces], atol=2e-6)
    (tmp_path / 'bad.obj').write_text('v 0 0 0\nvt 0 0\nf 1/1 1/1 1/1\n')
    with pytest.raises(InputError, match=r"bad.obj: lacks .* of the model's 100 triangles"):
        load_flame(p, uv=tmp_path / 'bad.obj')
    (tmp_path / 'none.obj').write_text('v 0 0 0\nf 1 1 1\n')
    with pytest.raises(InputError, match='none.obj should hold an atlas'):
        load_flame(p, uv=tmp_path / 'none.obj')
    np.savez(tmp_path / 'far.npz', vt=vt + 3, ft=ft)
    with pytest.raises(InputError, match='far.npz: uv should lie in 0..1'):
        load_flame(p, uv=tmp_path / 'far.npz')


def test_masks(tmp_path):
    p = ff.write_original(tmp_path / 'generic_model.pkl', SMALL)
    (tmp_path / 'FLAME_masks.pkl').write_bytes(
        ff.Python2(0).dumps(
            dict(left_ear=np.array([1, 2]), right_ear=np.array([5]), scalp=np.arange(9))
        )
    )
    h = load_flame(p)
    assert h.masks['ears'].nonzero()[:, 0].tolist() == [1, 2, 5]
    assert h.masks['scalp'].sum() == 9
    assert 'eyeballs' in h.masks
    assert 'lips' not in h.masks
    with pytest.raises(InputError, match="FLAME .*has no region 'lids'; it has eyeballs, left_ear"):
        h.masks['lids']
    (tmp_path / 'm.pkl').write_bytes(pickle.dumps(dict(scalp=np.array([99]))))
    with pytest.raises(
        InputError, match='m.pkl: scalp should be a list of vertex indices below 60'
    ):
        load_flame(p, masks=tmp_path / 'm.pkl')


@pytest.mark.parametrize(
    'n,keys',
    [
        (51, ('lmk_face_idx', 'lmk_b_coords')),
        (68, ('full_lmk_faces_idx', 'full_lmk_bary_coords')),
        (51, ('static_lmk_faces_idx', 'static_lmk_bary_coords')),
    ],
)
@pytest.mark.parametrize('kind', ['pkl', 'npy', 'npz'])
def test_landmarks(tmp_path, n, keys, kind):
    p = ff.write_original(tmp_path / 'generic_model.pkl', SMALL)
    f = np.arange(n)
    b = np.random.default_rng(0).dirichlet(np.ones(3), n)
    d = {keys[0]: f[None] if n == 68 else f, keys[1]: b[None] if n == 68 else b}
    e = tmp_path / f'landmark_embedding.{kind}'
    if kind == 'pkl':
        e.write_bytes(ff.Python2(2).dumps(d))
    elif kind == 'npy':
        np.save(e, d)
    else:
        np.savez(e, **d)
    h = load_flame(p)
    assert h.lmk_faces.tolist() == f.tolist()
    assert torch.allclose(h.lmk_bary, torch.as_tensor(b).float())
    want = (h.template[h.faces[h.lmk_faces]] * h.lmk_bary[..., None]).sum(1)
    assert torch.allclose(h.landmarks(h())[0], want, atol=1e-6)
    e.unlink()
    (tmp_path / 'e.pkl').write_bytes(pickle.dumps({keys[0]: f + 99, keys[1]: b}))
    with pytest.raises(InputError, match=r'e.pkl: .* should be triangles 0..99'):
        load_flame(p, embedding=tmp_path / 'e.pkl')
    with pytest.raises(InputError, match='no landmarks.*embedding='):
        load_flame(p).landmarks(h())


def test_landmark_file_with_tensors(tmp_path, canary):
    "A much used file keeps torch tensors beside its arrays: they stay unread, whatever they hold."
    p = ff.write_original(tmp_path / 'generic_model.pkl', SMALL)
    e = tmp_path / 'landmark_embedding.npy'
    np.save(
        e,
        dict(
            static_lmk_faces_idx=np.arange(51),
            static_lmk_bary_coords=np.full((51, 3), 1 / 3),
            dynamic_lmk_faces_idx=torch.arange(9),
        ),
    )
    assert load_flame(p).lmk_faces.tolist() == list(range(51))
    assert read_arrays(e)['dynamic_lmk_faces_idx'] is None
    e.write_bytes(
        b'(dS"lmk_face_idx"\n'
        + g('torch.storage', '_load_from_bytes')
        + b'(S"'
        + repr(EVIL['os_system'])[2:-1].replace('"', '\\"').encode()
        + b'"\ntRsS"lmk_b_coords"\nNs.'
    )
    refused(e, lambda _: load_flame(p), canary)


def test_texture_file_gives_its_atlas_alone(tmp_path):
    ft = np.arange(300).reshape(100, 3)
    np.savez_compressed(
        tmp_path / 'FLAME_texture.npz',
        vt=np.random.rand(300, 2),
        ft=ft,
        mean=np.zeros((512, 512, 3)),
        tex_dir=np.zeros((512, 512, 3, 20)),
    )
    p = ff.write_original(tmp_path / 'generic_model.pkl', SMALL)
    tracemalloc.start()
    assert load_flame(p).uv_faces.tolist() == ft.tolist()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e7


def test_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('SPATIALAVATAR0_DATA', str(tmp_path))
    for d in ('flame2020', 'flame_masks', 'flame_embeddings'):
        (tmp_path / d).mkdir()
    ff.write_original(tmp_path / 'flame2020' / 'generic_model.pkl', SMALL)
    (tmp_path / 'flame_masks' / 'FLAME_masks.pkl').write_bytes(
        pickle.dumps(dict(nose=np.arange(3)))
    )
    np.savez(
        tmp_path / 'flame_embeddings' / 'landmark_embedding.npz',
        lmk_face_idx=np.arange(51),
        lmk_b_coords=np.full((51, 3), 1 / 3),
    )
    h = load_flame('flame2020')
    assert h.name == 'FLAME 2020'
    assert 'nose' in h.masks
    assert len(h.lmk_faces) == 51


# ---- the head that comes out


def test_it_is_a_head(tmp_path):
    "The open head through FLAME's format: poses, batches, texels, pictures, copies."
    o = open_head()
    write_flame_folder(o, tmp_path / 'f')
    h = load_flame(tmp_path / 'f', num_shape=100, num_expr=52)
    p = poses(2, 100, 52)
    assert (h(**p) - o(**p)).abs().max() < 1e-6
    assert h(jaw=torch.zeros(1, 3), expr=torch.zeros(4, 9)).shape == (4, o.num_verts, 3)
    for k in ('face_ids', 'texels'):
        assert torch.equal(getattr(bind_uv(h, 32), k), getattr(bind_uv(o, 32), k))
    ids = [
        rasterize_mesh(x()[0], x.faces, orbit(20.0), intrinsics(300, 64, 64), 64, 64)[0]
        for x in (o, h)
    ]
    assert torch.equal(*ids) and (ids[0] >= 0).any()
    d = h.to(torch.float64)
    assert d().dtype == torch.float64
    assert d.name == h.name
    assert h().dtype == torch.float32
    torch.save(h, tmp_path / 'h.pt')
    again = torch.load(tmp_path / 'h.pt', weights_only=False)
    assert torch.equal(again(**p), h(**p))
    assert not hasattr(h, 'lmk_faces'), 'placeholders are not landmarks'
    for f, text in (
        (lambda: h.mirror, 'mirrored'),
        (lambda: h.arkit(dict(jawOpen=1.0)), 'ARKit'),
        (lambda: h.arkit_names, 'ARKit'),
    ):
        with pytest.raises(InputError, match=text):
            f()
    with pytest.raises(AttributeError):
        h.nonsense
    with pytest.raises(ValueError, match='has teeth|teeth grow'):
        load_flame(tmp_path / 'f', teeth=True)


def test_avatars_know_their_head(tmp_path):
    o = open_head()
    write_flame_folder(o, tmp_path / 'f')
    a = load_flame(tmp_path / 'f', num_shape=100, num_expr=52, release='FLAME 2020')
    d = pickle.loads((tmp_path / 'f' / 'FLAME_NEUTRAL.pkl').read_bytes())
    d['shapedirs'][0, 0, 301] += 0.001
    (tmp_path / 'f' / 'FLAME_NEUTRAL.pkl').write_bytes(pickle.dumps(d))
    b = load_flame(tmp_path / 'f', num_shape=100, num_expr=52, release='FLAME 2023')
    assert len({head_id(x) for x in (o, a, b)}) == 3  # one number of one expression apart
    new_avatar(a, 16).save(tmp_path / 'a.safetensors')
    assert len(Avatar.load(tmp_path / 'a.safetensors', a)) > 0
    for other in (b, None):
        with pytest.raises(
            InputError,
            match='made on another head.*FLAME 2020.*this is .*'
            + ('FLAME 2023' if other else 'open head'),
        ):
            Avatar.load(tmp_path / 'a.safetensors', other)


def test_portraits_on_a_head_without_regions(tmp_path):
    """An avatar from a picture says which region it misses; a head with all of them works, whatever
    its parts."""
    write_flame_folder(open_head(), tmp_path)
    frame = Frame(
        torch.rand(48, 48, 3),
        torch.ones(48, 48),
        orbit(0.0, distance=0.6, target=(0, 0, 0)),
        intrinsics(60, 48, 48),
        dict(shape=torch.zeros(1, 100)),
    )
    assert len(from_frame(frame, 16, load_flame(tmp_path, num_shape=100, num_expr=52))) > 0
    (tmp_path / 'FLAME_masks.pkl').write_bytes(pickle.dumps(dict(scalp=np.arange(9))))
    with pytest.raises(InputError, match="no region 'lid_rims'; it has eyeballs, scalp"):
        from_frame(frame, 16, load_flame(tmp_path, num_shape=100, num_expr=52))


def test_teeth_need_lips(tmp_path):
    p = ff.write_original(tmp_path / 'generic_model.pkl', SMALL)
    with pytest.raises(InputError, match='lips=.*embedding=.*none'):
        load_flame(p, teeth=True)
    with pytest.raises(InputError, match='two lists of 15 vertices below 60'):
        load_flame(p, lips=(range(14), range(14)))
    h = load_flame(p, teeth=True, lips=(range(15), range(15, 30)))
    assert h.num_verts == 180
    assert h.part_names[-2:] == ['teeth_up', 'teeth_low']
    assert h.masks['teeth'].sum() == 120
    assert (h.weights[60:120, 1] == 1).all()
    assert (h.weights[120:, 2] == 1).all()
    assert (h.J_regressor[:, 60:] == 0).all()
    assert h.expr_basis[:, 60:].abs().max() == 0 == h.pose_basis[:, 60:].abs().max()


def test_teeth_from_landmarks(tmp_path):
    "On a sheet of triangles, lips are where the landmarks say: 51 or 68 of them, the same teeth."
    x, y = np.meshgrid(np.linspace(-0.05, 0.05, 21), np.linspace(-0.05, 0.05, 21))
    v = np.stack([x.ravel(), y.ravel(), 0.02 - x.ravel() ** 2 * 8], 1)
    c = np.arange(420)
    c = c[c % 21 < 20]
    f = np.concatenate([np.stack([c, c + 1, c + 22], 1), np.stack([c, c + 22, c + 21], 1)])
    t = np.linspace(0, 2 * np.pi, 13)[:-1]
    at = np.array(
        [np.abs(v[:, :2] - (-0.025 * np.cos(s), 0.012 * np.sin(s))).sum(1).argmin() for s in t]
    )
    tri = np.array([np.argwhere(f == i)[0] for i in at])
    lips = tri[:, 0], np.eye(3)[tri[:, 1]]
    r = np.random.default_rng(0)
    a = dict(
        name='sheet',
        template=v,
        faces=f,
        shape_basis=r.normal(size=(4, 441, 3)),
        expr_basis=r.normal(size=(2, 441, 3)),
        weights=np.eye(5)[np.ones(441, int)],
        J_regressor=np.full((5, 441), 1 / 441),
        parts=np.zeros(len(f), int),
        part_names=np.array(['skin']),
        mask_names=np.array([], 'U9'),
        mask_table=np.zeros((0, 441)),
    )

    def marks(n):
        k = 17 * (n == 68) + 31
        i, b = np.zeros(n, int), np.full((n, 3), 1 / 3)
        i[k : k + 12], b[k : k + 12] = lips
        return dict(a, lmk_faces=i, lmk_bary=b)

    out = [add_teeth(marks(n)) for n in (51, 68)]
    assert np.array_equal(out[0]['template'], out[1]['template'])
    new = out[0]['template'][441:]
    assert abs(new[:, 0].mean()) < 1e-9
    assert np.ptp(new[:, 0]) > 0.03
    assert new[:, 2].max() < 0.02
    assert (np.diff(new.reshape(8, 15, 3)[..., 0], axis=1) > 0).all()
    with pytest.raises(InputError, match='do not lie on a line'):
        add_teeth(dict(marks(51), lmk_faces=np.zeros(51, int)))


# ---- malformed: one clear sentence


def broken(**change):
    return {k: v for k, v in {**SMALL, **change}.items() if v is not None}


nan = SMALL['v_template'].copy()
nan[3, 1] = np.nan
MALFORMED = dict(
    lacks_a_key=(broken(posedirs=None), 'lacks posedirs'),
    smpl=(
        broken(kintree_table=np.array([[2**32 - 1, *range(23)], range(24)])),
        'got 24 joints with parents -1 0 1 2',
    ),
    other_tree=(
        broken(kintree_table=np.array([[2**32 - 1, 0, 0, 1, 1], range(5)])),
        'parents -1 0 0 1 1',
    ),
    float_tree=(broken(kintree_table=np.zeros((2, 5))), 'should hold integers; got float64'),
    wrong_shape=(
        broken(posedirs=np.zeros((60, 3, 207))),
        r'posedirs should be \(60,3,36\); got \(60, 3, 207\)',
    ),
    other_count=(broken(weights=np.full((59, 5), 0.2)), r'weights should be \(60,5\)'),
    nan=(broken(v_template=nan), 'v_template holds nan'),
    face_out_of_range=(broken(f=np.full((100, 3), 60)), r'vertex indices 0..59'),
    negative_face=(broken(f=np.full((100, 3), -1)), 'vertex indices'),
    float_faces=(broken(f=np.zeros((100, 3))), 'vertex indices'),
    weights=(
        broken(weights=SMALL['weights'] * 1.1),
        'weights should sum to 1; they are off by up to 0.1',
    ),
    negative=(broken(weights=np.tile([1.5, -0.5, 0, 0, 0], (60, 1))), 'not be negative'),
    regressor=(broken(J_regressor=SMALL['J_regressor'] * 2), 'J_regressor should sum to 1'),
    text=(broken(weights='none'), 'weights should hold numbers'),
    ragged=(broken(weights=[[1, 2], [3]]), 'weights should hold numbers'),
    millimetres=(broken(v_template=SMALL['v_template'] * 1000), 'in metres'),
    a_list=([1, 2], 'dictionary'),
    masks=(dict(face=np.arange(3), scalp=np.arange(3)), 'not a FLAME model.*it has face, scalp'),
)


@pytest.mark.parametrize('kind', MALFORMED)
def test_malformed(tmp_path, kind):
    d, text = MALFORMED[kind]
    (tmp_path / 'generic_model.pkl').write_bytes(
        ff.Python2(2).dumps(d) if kind != 'millimetres' else pickle.dumps(d)
    )
    with pytest.raises(InputError, match=text) as e:
        load_flame(tmp_path / 'generic_model.pkl')
    assert 'generic_model.pkl' in str(e.value)
    assert '\n' not in str(e.value)


GOOD = ff.Python2(2).dumps(ff.original(ff.model(columns=12)))
NOT_IT = dict(
    empty=b'',
    blank=b'\n\n',
    page=b'<!DOCTYPE html><html>log in</html>',
    lfs=b'version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n',
    truncated=GOOD[: len(GOOD) // 2],
    no_end=GOOD[:-1],
    text=b'hello there',
    zip=b'PK\x05\x06' + bytes(18),
    half_a_zip=b'PK\x03\x04' + bytes(30),
    gzip=b'\x1f\x8b' + bytes(40),
)


@pytest.mark.parametrize('kind', NOT_IT)
def test_not_it_at_all(tmp_path, kind):
    (tmp_path / 'generic_model.pkl').write_bytes(NOT_IT[kind])
    with pytest.raises(InputError, match='generic_model.pkl') as e:
        load_flame(tmp_path / 'generic_model.pkl')
    assert {
        'empty': 'is empty',
        'blank': 'is empty',
        'page': 'web page',
        'lfs': 'git lfs pull',
        'gzip': 'packed with gzip',
        'truncated': 'breaks off',
        'no_end': 'breaks off',
    }.get(kind, 'download it again') in str(e.value) or kind == 'zip'


# ---- malicious: nothing runs. The canary is a function that must not be called, a module that must
# not be imported, a file that must not appear.


class Call:
    "Pickles as a call of any callable."

    def __init__(self, f, *args):
        self.f, self.args = f, args

    def __reduce__(self):
        return self.f, self.args


def g(module, name):
    return b'c' + module.encode() + b'\n' + name.encode() + b'\n'


def s4(t):
    return b'\x8c' + bytes([len(t)]) + t.encode()


ARR = ff.Python2(1).dumps(np.arange(3.0))[:-1]
CMD = b'S"touch CANARY"\n'
EVIL = dict(
    os_system=g('os', 'system') + b'(' + CMD + b'tR.',
    posix=g('posix', 'system') + b'(' + CMD + b'tR.',
    subprocess=g('subprocess', 'check_output') + b'(]' + CMD + b'aI01\ntR.',
    eval=g('builtins', 'eval') + b'(S"__import__(\'canary\').sing()"\ntR.',
    python_2_eval=g('__builtin__', 'eval') + b'(S"__import__(\'canary\').sing()"\ntR.',
    exec=g('builtins', 'exec') + b'(S"import canary"\ntR.',
    imports=g('canary_module', 'anything') + b'.',
    getattr_chain=g('builtins', 'getattr') + b'(' + g('os', 'path') + b'S"os"\ntR.',
    attrgetter=g('operator', 'attrgetter') + b'(S"system"\ntR(' + g('os', 'path') + b'tR.',
    numpy_load=g('numpy', 'load') + b'(' + CMD + b'tR.',
    numpy_testing=g('numpy.testing._private.utils', 'runstring') + b'(S"import canary"\n}tR.',
    numpy_f2py=g('numpy.f2py', 'compile') + b'(' + CMD + b'tR.',
    numpy_ctypes=g('numpy.ctypeslib', 'load_library') + b'(' + CMD + b'S"."\ntR.',
    numpy_memmap=g('numpy', 'memmap') + b'(S"CANARY"\nS"u1"\nS"w+"\nI0\n(I9\nttR.',
    numpy_fromfile=g('numpy', 'ndarray.tofile') + b'.',
    dotted_protocol_4=b'\x80\x04'
    + s4('numpy')
    + s4('ndarray.tofile')
    + b'\x93'
    + ARR
    + s4('CANARY')
    + b'\x86R.',
    dotted_os=b'\x80\x04'
    + s4('numpy')
    + s4('os.system')
    + b'\x93'
    + s4('touch CANARY')
    + b'\x85R.',
    spaced=b'\x80\x04' + s4('numpy.core.multiarray ') + s4('_reconstruct') + b'\x93.',
    inst=b'(' + CMD + b'ios\nsystem\n.',
    obj=b'(' + g('os', 'system') + CMD + b'o.',
    newobj=b'\x80\x02' + g('os', 'system') + CMD + b'\x85\x81.',
    newobj_ex=b'\x80\x04' + s4('subprocess') + s4('Popen') + b'\x93)}\x92.',
    persistent=b'Pcanary\n.',
    binary_persistent=CMD + b'Q.',
    extension=b'\x82\x01.',
    extension_4=b'\x84\x01\x00\x00\x00.',
    buffer=b'\x80\x05\x97.',
    chumpy_setstate=g('copy_reg', '_reconstructor')
    + b'('
    + g('chumpy.ch', 'Ch')
    + g('__builtin__', 'object')
    + b'NtR(dS"__setstate__"\n'
    + g('os', 'system')
    + b'sb'
    + CMD
    + b'b.',
    chumpy_data=g('copy_reg', '_reconstructor')
    + b'('
    + g('chumpy.ch', 'Ch')
    + g('__builtin__', 'object')
    + b'NtR(dS"x"\n'
    + g('os', 'system')
    + b'('
    + CMD
    + b'tRsb.',
    chumpy_other=g('chumpy.ch', 'MatVecMult') + b'.',
    chumpy_args=b'\x80\x02' + g('chumpy.ch', 'Ch') + CMD + b'\x85\x81.',
    chumpy_call=g('chumpy.ch', 'Ch') + b'(' + CMD + b'tR.',
    class_state=g('chumpy.ch', 'Ch') + b'(dS"__reduce__"\n' + b'Nsb.',
    function_state=g('numpy.core.multiarray', '_reconstruct') + b'N}S"__doc__"\nNs\x86b.',
    reconstructor=g('copy_reg', '_reconstructor')
    + b'('
    + g('builtins', 'object')
    + g('builtins', 'object')
    + b'NtR.',
    reconstructor_base=g('copy_reg', '_reconstructor')
    + b'('
    + g('chumpy.ch', 'Ch')
    + g('builtins', 'set')
    + b'(ltR.',
    reconstruct_other=g('numpy.core.multiarray', '_reconstruct')
    + b'('
    + g('chumpy.ch', 'Ch')
    + b'(I0\ntS"b"\ntR.',
    encode_other=g('_codecs', 'encode') + b'(S"x"\nS"unicode_escape"\ntR.',
    encode_registered=g('_codecs', 'encode') + b'(S"x"\nS"canary"\ntR.',
    codecs_lookup=g('_codecs', 'lookup') + b'(S"canary"\ntR.',
    set_of_trap=g('builtins', 'set') + b'(' + g('os', 'system') + b'(' + CMD + b'tRtR.',
    call_text=b'S"os.system"\n(' + CMD + b'tR.',
    call_result=g('builtins', 'set') + b'((ltR(' + CMD + b'tR.',
    hidden_late=GOOD[:-1] + b'0' + g('os', 'system') + b'(' + CMD + b'tR.',
    torch=g('torch._utils', '_rebuild_tensor') + b'(tR.',
    pip=g('pip', 'main') + b'(]' + CMD + b'atR.',
    newline=b'\x80\x04' + s4('os\nAll is well.\n\x1b[2J') + s4('system') + b'\x93.',
    shadow=g('numpy.core.multiarray', 'scalar') + b'(' + g('os', 'system') + CMD + b'tR.',
)
BOMBS = dict(
    declared=ARR.replace(b'K\x03\x85', b'I1000000000000\n\x85')
    if b'K\x03\x85' in ARR
    else ARR.replace(b'(K\x03t', b'(I1000000000000\nt'),
    huge_tuple=ARR.replace(b'(K\x03t', b'(' + b'M\xff\xff' * 9 + b't'),
    negative=ARR.replace(b'(K\x03t', b'(I-1\nt'),
    object_bytes=ARR.replace(b'U\x02f8', b'U\x02O8'),
    fields=ARR.replace(b'U\x02f8', b'U\x04V999'),
    long_double=ARR.replace(b'U\x02f8', b'U\x03f16'),
    bytearray=b'\x80\x05\x96' + struct.pack('<Q', 10**12) + b'xx.',
    binbytes=b'\x80\x04\x8e' + struct.pack('<Q', 10**12) + b'xx.',
    text=b'\x80\x04\x8d' + struct.pack('<Q', 10**12) + b'xx.',
    long=b'\x80\x02\x8b' + struct.pack('<i', 2**31 - 1) + b'1.',
    memo=b'Nr\xff\xff\xff\xff0.',
    memo_text=b'Np99999999999999\n0.',
    frame=b'\x80\x04\x95' + struct.pack('<Q', 2**62) + b'N.',
    digits=b'L' + b'9' * 10**6 + b'L\n.',
    digits_int=b'I' + b'9' * 10**6 + b'\n.',
    deep_key=b'}' + b'(' * 1 + b'N' + b'\x85' * 10**6 + b'Nsu.',
    deep_list=b']' * 10**6 + b'a' * (10**6 - 1) + b'.',
    deep_set=b'\x80\x04\x8f(' + b'N' + b'\x85' * 10**6 + b'\x90.',
    copies=b'X'
    + struct.pack('<I', 10**6)
    + b'x' * 10**6
    + b'q\x00'
    + g('_codecs', 'encode')
    + b'q\x010'
    + b'h\x01h\x00U\x06latin1\x86R' * 5000
    + b't.',
    sparse=ff.Python2(2).dumps(
        ff.Made(
            'scipy.sparse.csc',
            'csc_matrix',
            _shape=(10**6, 10**6),
            data=np.zeros(0),
            indices=np.zeros(0, int),
            indptr=np.zeros(10**6 + 1, int),
        )
    ),
    sparse_wrap=ff.Python2(2).dumps(
        ff.Made(
            'scipy.sparse.csc',
            'csc_matrix',
            _shape=(5, 1),
            data=np.zeros(1),
            indices=np.zeros(1, int),
            indptr=np.array([-(10**12), 1]),
        )
    ),
    sparse_out=ff.Python2(2).dumps(
        ff.Made(
            'scipy.sparse.csc',
            'csc_matrix',
            _shape=(5, 1),
            data=np.zeros(1),
            indices=np.array([7]),
            indptr=np.array([0, 1]),
        )
    ),
    select_out=ff.Python2(2).dumps(
        ff.Made(
            'chumpy.reordering', 'Select', a=np.zeros(3), idxs=np.array([9]), preferred_shape=(1,)
        )
    ),
    itself=ff.Python2(2).dumps(ff.Made('chumpy.ch', 'Ch', y=1)),
    select_shape=ff.Python2(2).dumps(
        ff.Made(
            'chumpy.reordering',
            'Select',
            a=np.zeros(3),
            idxs=np.array([1]),
            preferred_shape=(10**9, 10**9),
        )
    ),
)

'x'.encode('raw_unicode_escape')  # a codec Python fetches when first used
HEARD, LISTENING = [], []


def listen(event, args):
    if LISTENING and (
        event
        in (
            'os.system',
            'subprocess.Popen',
            'os.exec',
            'os.posix_spawn',
            'exec',
            'pickle.find_class',
            'ctypes.dlopen',
            'socket.connect',
            'os.remove',
        )
        or event == 'open'
        and isinstance(args[1], str)
        and set(args[1]) & set('wax+')
        or event == 'import'
        and args[0].split('.')[0] in ('canary', 'canary_module', 'subprocess', 'chumpy', 'this')
    ):
        HEARD.append((event, args))


sys.addaudithook(listen)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    "A place to run in, a module that sings, ears on everything Python does."
    sung = []
    mod = types.ModuleType('canary')
    mod.sing = lambda *a: sung.append(a)
    monkeypatch.setitem(sys.modules, 'canary', mod)
    monkeypatch.chdir(tmp_path)
    HEARD.clear()
    yield lambda: (
        sung,
        list(HEARD),
        [p.name for p in tmp_path.rglob('*CANARY*')],
        'canary_module' in sys.modules,
    )


def refused(path, read, canary):
    LISTENING.append(1)
    try:
        with pytest.raises(InputError) as e:
            read(path)
    finally:
        LISTENING.clear()
    assert canary() == ([], [], [], False), 'something ran'
    assert path.name in str(e.value)
    assert '\n' not in str(e.value)
    assert len(str(e.value)) < 600
    assert str(e.value).isprintable()
    return str(e.value)


@pytest.mark.parametrize('kind', EVIL)
@pytest.mark.parametrize('where', ['model', 'masks', 'npy', 'npz'])
def test_nothing_runs(tmp_path, canary, kind, where):
    model = ff.write_original(tmp_path / 'generic_model.pkl', SMALL) if where == 'masks' else None
    if where == 'model':
        text = refused(write(tmp_path / 'generic_model.pkl', EVIL[kind]), load_flame, canary)
    elif where == 'masks':
        text = refused(
            write(tmp_path / 'FLAME_masks.pkl', EVIL[kind]), lambda p: load_flame(model), canary
        )
    else:
        text = refused(
            write_npy(tmp_path / f'x.{where}', EVIL[kind]),
            read_arrays if where == 'npy' else load_flame,
            canary,
        )
    assert 'refused' in text or kind in ('call_result',), text


def write(path, data):
    path.write_bytes(data)
    return path


def write_npy(path, payload):
    "An array of objects, whose bytes are a pickle."
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, dict(descr='|O', fortran_order=False, shape=()))
    f.write(payload)
    if path.suffix == '.npy':
        return write(path, f.getvalue())
    with zipfile.ZipFile(path, 'w') as z:
        z.writestr('v_template.npy', f.getvalue())
    return path


def test_the_canary_sings(tmp_path, canary):
    "The traps do work on Python's own unpickler: the tests above would notice."
    LISTENING.append(1)
    for kind in ('os_system', 'eval', 'dotted_protocol_4', 'inst'):
        try:
            pickle.loads(EVIL[kind])
        except Exception:
            pass
    LISTENING.clear()
    sung, heard, files, _ = canary()
    assert sung == [()]
    assert files == ['CANARY']
    assert {e for e, _ in heard} >= {'os.system', 'pickle.find_class'}


@pytest.mark.parametrize('kind', BOMBS)
def test_bombs(tmp_path, canary, kind):
    path = write(tmp_path / 'generic_model.pkl', BOMBS[kind])
    tracemalloc.start()
    text = refused(path, lambda p: load_flame(p) if kind != 'copies' else read_arrays(p), canary)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400_000_000 or kind == 'copies', (peak, text)


def test_npz_tricks(tmp_path, canary):
    def zipped(name, members, **kw):
        with zipfile.ZipFile(tmp_path / name, 'w', zipfile.ZIP_DEFLATED) as z:
            for k, v in members.items():
                z.writestr(k, v)
        return tmp_path / name

    def npy(shape, data=b'', descr='<f8'):
        f = io.BytesIO()
        np.lib.format.write_array_header_1_0(f, dict(descr=descr, fortran_order=False, shape=shape))
        return f.getvalue() + data

    assert 'needs' in refused(
        zipped('huge.npz', {'v_template.npy': npy((10**12, 3))}), load_flame, canary
    )
    assert 'unfolds to' in refused(
        zipped('bomb.npz', {'v_template.npy': npy((10**6, 100), bytes(8 * 10**8))}),
        lambda p: read_arrays(p, limit=10**8),
        canary,
    )
    refused(
        zipped(
            'path.npz', {'../CANARY.npy': npy((1,), bytes(8)), '/CANARY.npy': npy((1,), bytes(8))}
        ),
        load_flame,
        canary,
    )
    assert not (tmp_path.parent / 'CANARY.npy').exists()
    refused(
        zipped(
            'header.npz',
            {
                'v_template.npy': b'\x93NUMPY\x01\x00\x40\x00'
                + b"{'descr': __import__('canary').sing(), 'shape': (1,)}".ljust(64)
            },
        ),
        load_flame,
        canary,
    )
    refused(
        zipped('fields.npz', {'v_template.npy': npy((1,), bytes(8), [('a', 'O')])}),
        load_flame,
        canary,
    )
    assert 'without arrays' in refused(
        zipped('torch.npz', {'archive/data.pkl': EVIL['os_system']}), load_flame, canary
    )
    good = zipped('cut.npz', {'v_template.npy': npy((100,), bytes(800))})
    good.write_bytes(good.read_bytes()[:-30])
    refused(good, load_flame, canary)
    refused(write(tmp_path / 'x.npy', npy((10**12,))), read_arrays, canary)
    big = tmp_path / 'big.pkl'
    big.touch()
    big.open('r+b').truncate(10**10)
    assert '10,000,000,000 bytes' in refused(big, load_flame, canary)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage(data):
    """Bytes changed, cut out or doubled anywhere: an error in one sentence, or a value; never
    anything else."""
    b = bytearray(
        data.draw(
            st.sampled_from(
                [
                    GOOD[:4000] + GOOD[-300:],
                    ff.Python2(0).dumps(ff.original(ff.model(columns=1)))[:6000],
                    pickle.dumps(
                        dict(a=np.eye(3), b=scipy.sparse.csc_matrix(np.eye(3)), c={1, 2}, d='x'), 4
                    ),
                    EVIL['chumpy_data'],
                    EVIL['dotted_protocol_4'],
                ]
            )
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        i, j = sorted(data.draw(st.tuples(*[st.integers(0, len(b))] * 2)))
        how = data.draw(st.sampled_from(['set', 'cut', 'double']))
        if how == 'set' and i < len(b):
            b[i] = data.draw(st.integers(0, 255))
        elif how == 'cut' and j - i < 200:
            del b[i:j]
        elif how == 'double' and j - i < 200:
            b[i:i] = b[i:j]
    LISTENING.append(1)
    HEARD.clear()
    try:
        unpickle(bytes(b))
    except InputError:
        pass
    finally:
        LISTENING.clear()
    assert not HEARD


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x) | st.tuples(x, x),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(plain, st.integers(0, 5))
def test_harmless_pickles_read_as_ever(x, protocol):
    assert unpickle(pickle.dumps(x, protocol)) == x


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from('b1 i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8 >i4 >f8 S3 U4'.split()),
    st.lists(st.integers(0, 4), max_size=3),
    st.booleans(),
    st.integers(0, 5),
)
def test_arrays_read_as_numpy_does(dtype, shape, fortran, protocol):
    a = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    a = np.asfortranarray(a) if fortran else a
    b = unpickle(pickle.dumps(a, protocol))
    assert b.dtype == a.dtype
    assert b.shape == a.shape
    assert np.array_equal(a, b)
