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


SCALES = dict(shape=1.0, expr=0.5, rotation=0.5, neck=0.3, jaw=0.3, eyes=0.3, translation=0.1)


def poses(B=3, S=300, E=100, seed=0):
    "Random parameters of B heads."
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(shape=S, expr=E, rotation=3, neck=3, jaw=3, eyes=6, translation=3)
    return {
        name: torch.randn(B, sizes[name], generator=generator) * scale
        for name, scale in SCALES.items()
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
    model = dict(m, J_regressor=scipy.sparse.csc_matrix(m['J_regressor']))
    marks = dict(lmk_face_idx=np.zeros(51, int), lmk_b_coords=np.full((51, 3), 1 / 3))
    (folder / 'FLAME_NEUTRAL.pkl').write_bytes(pickle.dumps(model, 2))
    (folder / 'flame_static_embedding.pkl').write_bytes(pickle.dumps(marks, 2))
    return folder


# ---- the original encodings


@pytest.mark.parametrize('protocol', [0, 1, 2])
@pytest.mark.parametrize('kintree', [np.uint32, np.int64])
def test_original_encodings(tmp_path, protocol, kintree):
    m = ff.model(kintree=kintree, columns=30)
    path = ff.write_original(tmp_path / 'generic_model.pkl', m, protocol)
    head = load_flame(path, num_shape=20, num_expr=10)
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


def sizes(head):
    "Vertices, triangles, shape and expression directions."
    return head.num_verts, len(head.faces), head.num_shape, head.num_expr


def test_flames_own_sizes(tmp_path):
    m = ff.model(5023, 9976, kintree=np.int64)
    head = load_flame(ff.write_original(tmp_path / 'flame2023.pkl', m))
    p = poses(2)
    assert sizes(head) == (5023, 9976, 300, 100)
    assert head.name == 'FLAME 2023'
    assert (head(**p) - smplx_verts(for_smplx(tmp_path, m), p)).abs().max() < 1e-5
    lips = np.arange(15), np.arange(100, 115)
    more = load_flame(tmp_path / 'flame2023.pkl', teeth=True, lips=lips, num_shape=100, num_expr=50)
    p = {**p, 'shape': p['shape'][:, :100], 'expr': p['expr'][:, :50]}
    assert sizes(more) == (5143, 10144, 100, 50)
    mean = (more.shape_basis[:, lips[0]] + more.shape_basis[:, lips[1]]) / 2
    assert torch.allclose(more.shape_basis[:, 5023:5038], mean, atol=1e-7)
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
    model = dict(SMALL, J_regressor=scipy.sparse.csr_matrix(SMALL['J_regressor']))
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps(model, protocol))
    weights = torch.as_tensor(SMALL['weights'].astype(np.float32))
    assert torch.equal(load_flame(tmp_path / 'x.pkl').weights, weights)


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


TOLD = dict(
    numbers=lambda m: dict(m, num_shape=110, num_expr=np.array(40)),
    smplx=lambda m: dict(m, num_betas=np.int64(110), num_expression_coeffs=40),
    apart=lambda m: dict(
        m, shapedirs=m['shapedirs'][..., :110], exprdirs=m['shapedirs'][..., 110:]
    ),
    twice=lambda m: dict(m, expressiondirs=m['shapedirs'][..., 110:]),
)


@pytest.mark.parametrize('how', TOLD)
@pytest.mark.parametrize('kind', ['pkl', 'npz'])
def test_a_file_tells_its_split(tmp_path, how, kind):
    m = ff.model(columns=150)
    told = TOLD[how](m)
    p = tmp_path / f'model.{kind}'
    if kind == 'pkl':
        p.write_bytes(pickle.dumps(told))
    else:
        np.savez(p, **told)
    h = load_flame(p)
    assert (h.num_shape, h.num_expr) == (110, 40)
    assert np.allclose(h.expr_basis[0], m['shapedirs'][..., 110])
    assert load_flame(p, num_expr=10).num_expr == 10
    with pytest.raises(InputError, match='ask for more'):
        load_flame(p, num_shape=111)


def test_splits_that_do_not_add_up(tmp_path):
    m = ff.model(columns=150)
    for wrong, says in (
        (dict(num_shape=110, num_expr=41), 'says that it has 110 . 41 directions'),
        (dict(num_shape=-1, num_expr=151), 'should be whole numbers'),
        (dict(num_shape=110.5, num_expr=39.5), 'should be whole numbers'),
        (dict(num_shape='110', num_expr='40'), 'should hold numbers'),
        (dict(exprdirs=np.zeros((3, 3, 9))), 'as many vertices as shapedirs'),
        (dict(exprdirs=[[1], [1, 2]]), 'exprdirs should hold numbers'),
    ):
        p = tmp_path / 'model.pkl'
        p.write_bytes(pickle.dumps(dict(m, **wrong)))
        with pytest.raises(InputError, match=says) as error:
            load_flame(p)
        assert '\n' not in str(error.value)


def test_all_columns_in_another_split(tmp_path):
    "400 columns are 300 + 100, unless both numbers say otherwise."
    p = ff.write_original(tmp_path / 'x.pkl', SMALL)
    assert np.allclose(
        load_flame(p, num_shape=350, num_expr=50).expr_basis[0], SMALL['shapedirs'][..., 350]
    )
    assert np.allclose(
        load_flame(p, num_shape=200, num_expr=50).expr_basis[0], SMALL['shapedirs'][..., 300]
    )


# ---- what lies beside the model


def test_uv(tmp_path):
    p = ff.write_original(tmp_path / 'generic_model.pkl', SMALL)
    F = len(SMALL['f'])
    r = np.random.default_rng(0)
    assert not hasattr(load_flame(p), 'uv')
    with pytest.raises(InputError, match='no atlas.*uv='):
        bind_uv(load_flame(p), 16)
    vt = r.random((3 * F, 2))
    ft = np.arange(3 * F).reshape(F, 3)
    np.savez(tmp_path / 'uv.npz', vt=vt, ft=ft, mean=np.array([None]))
    a = load_flame(p)
    corners = np.stack([vt[ft][..., 0], 1 - vt[ft][..., 1]], -1)
    assert torch.allclose(a.uv[a.uv_faces], torch.as_tensor(corners).float())
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
    masks = dict(left_ear=np.array([1, 2]), right_ear=np.array([5]), scalp=np.arange(9))
    (tmp_path / 'FLAME_masks.pkl').write_bytes(ff.Python2(0).dumps(masks))
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
    with pytest.raises(InputError, match='ARKit'):
        h.arkit(dict(jawOpen=1.0))
    for name, text in (('mirror', 'mirrored'), ('arkit_names', 'ARKit')):
        with pytest.raises(InputError, match=text):
            getattr(h, name)
    assert not hasattr(h, 'nonsense')
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
    for other, name in ((b, 'FLAME 2023'), (None, 'open head')):
        with pytest.raises(InputError, match=f'made on another head.*FLAME 2020.*this is .*{name}'):
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


def sheet():
    "A curved sheet of triangles as a head: 21 x 21 vertices, 10 centimetres wide."
    x, y = np.meshgrid(np.linspace(-0.05, 0.05, 21), np.linspace(-0.05, 0.05, 21))
    i = np.arange(420)
    i = i[i % 21 < 20]
    faces = np.concatenate([np.stack([i, i + 1, i + 22], 1), np.stack([i, i + 22, i + 21], 1)])
    r = np.random.default_rng(0)
    return dict(
        name='sheet',
        template=np.stack([x.ravel(), y.ravel(), 0.02 - x.ravel() ** 2 * 8], 1),
        faces=faces,
        shape_basis=r.normal(size=(4, 441, 3)),
        expr_basis=r.normal(size=(2, 441, 3)),
        weights=np.eye(5)[np.ones(441, int)],
        J_regressor=np.full((5, 441), 1 / 441),
        parts=np.zeros(len(faces), int),
        part_names=np.array(['skin']),
        mask_names=np.array([], 'U9'),
        mask_table=np.zeros((0, 441)),
    )


def with_lips(head, count):
    "So many landmarks, twelve of them on an ellipse, the outer lip."
    angles = np.linspace(0, 2 * np.pi, 13)[:-1]
    ellipse = np.stack([-0.025 * np.cos(angles), 0.012 * np.sin(angles)], 1)
    nearest = [np.abs(head['template'][:, :2] - p).sum(1).argmin() for p in ellipse]
    corners = np.array([np.argwhere(head['faces'] == v)[0] for v in nearest])
    first = 31 if count == 51 else 48
    faces = np.zeros(count, int)
    bary = np.full((count, 3), 1 / 3)
    faces[first : first + 12] = corners[:, 0]
    bary[first : first + 12] = np.eye(3)[corners[:, 1]]
    return dict(head, lmk_faces=faces, lmk_bary=bary)


def test_teeth_from_landmarks():
    "On a sheet of triangles, lips are where the landmarks say: 51 or 68 of them, the same teeth."
    few = add_teeth(with_lips(sheet(), 51))
    many = add_teeth(with_lips(sheet(), 68))
    assert np.array_equal(few['template'], many['template'])
    new = few['template'][441:]
    assert abs(new[:, 0].mean()) < 1e-9
    assert np.ptp(new[:, 0]) > 0.03
    assert new[:, 2].max() < 0.02
    assert (np.diff(new.reshape(8, 15, 3)[..., 0], axis=1) > 0).all()
    with pytest.raises(InputError, match='do not lie on a line'):
        add_teeth(dict(with_lips(sheet(), 51), lmk_faces=np.zeros(51, int)))


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
SAID = dict(
    empty='is empty',
    blank='is empty',
    page='web page',
    lfs='git lfs pull',
    gzip='packed with gzip',
    truncated='breaks off',
    no_end='breaks off',
    zip='is a zip without arrays',
)


@pytest.mark.parametrize('kind', NOT_IT)
def test_not_it_at_all(tmp_path, kind):
    (tmp_path / 'generic_model.pkl').write_bytes(NOT_IT[kind])
    with pytest.raises(InputError, match='generic_model.pkl') as e:
        load_flame(tmp_path / 'generic_model.pkl')
    assert SAID.get(kind, 'download it again') in str(e.value)


# ---- malicious: nothing runs. The canary is a function that must not be called, a module that must
# not be imported, a file that must not appear.


class Call:
    "Pickles as a call of any callable."

    def __init__(self, f, *args):
        self.f, self.args = f, args

    def __reduce__(self):
        return self.f, self.args


def g(module, name):
    "Fetch a name."
    return b'c' + module.encode() + b'\n' + name.encode() + b'\n'


def s4(text):
    "A short text of protocol 4."
    return b'\x8c' + bytes([len(text)]) + text.encode()


def call(module, name, *args):
    "Call a name."
    return g(module, name) + b'(' + b''.join(args) + b'tR'


def get(module, name):
    "Fetch a name in protocol 4, where it may have dots."
    return b'\x80\x04' + s4(module) + s4(name) + b'\x93'


def old_object(cls, base=('__builtin__', 'object'), state=b'N'):
    "An object as Python 2 made it."
    return call('copy_reg', '_reconstructor', g(*cls), g(*base), state)


CH = 'chumpy.ch', 'Ch'
CSC = 'scipy.sparse.csc', 'csc_matrix'
SELECT = 'chumpy.reordering', 'Select'
ARR = ff.Python2(1).dumps(np.arange(3.0))[:-1]
CMD = b'S"touch CANARY"\n'
SING = b'S"__import__(\'canary\').sing()"\n'
SYSTEM = g('os', 'system')
ORDERS = dict(  # functions that run something
    os_system=call('os', 'system', CMD),
    posix=call('posix', 'system', CMD),
    subprocess=call('subprocess', 'check_output', b']' + CMD + b'aI01\n'),
    eval=call('builtins', 'eval', SING),
    python_2_eval=call('__builtin__', 'eval', SING),
    exec=call('builtins', 'exec', b'S"import canary"\n'),
    imports=g('canary_module', 'anything'),
    getattr_chain=call('builtins', 'getattr', g('os', 'path'), b'S"os"\n'),
    attrgetter=call('operator', 'attrgetter', b'S"system"\n') + b'(' + g('os', 'path') + b'tR',
    numpy_load=call('numpy', 'load', CMD),
    numpy_testing=g('numpy.testing._private.utils', 'runstring') + b'(S"import canary"\n}tR',
    numpy_f2py=call('numpy.f2py', 'compile', CMD),
    numpy_ctypes=call('numpy.ctypeslib', 'load_library', CMD, b'S"."\n'),
    numpy_memmap=call('numpy', 'memmap', b'S"CANARY"\nS"u1"\nS"w+"\nI0\n(I9\nt'),
    numpy_fromfile=g('numpy', 'ndarray.tofile'),
    dotted_protocol_4=get('numpy', 'ndarray.tofile') + ARR + s4('CANARY') + b'\x86R',
    dotted_os=get('numpy', 'os.system') + s4('touch CANARY') + b'\x85R',
    spaced=get('numpy.core.multiarray ', '_reconstruct'),
    torch=call('torch._utils', '_rebuild_tensor'),
    pip=call('pip', 'main', b']' + CMD + b'a'),
    newline=get('os\nAll is well.\n\x1b[2J', 'system'),
    hidden_late=GOOD[:-1] + b'0' + call('os', 'system', CMD),
)
INSTRUCTIONS = dict(  # other ways to call or import
    inst=b'(' + CMD + b'ios\nsystem\n',
    obj=b'(' + SYSTEM + CMD + b'o',
    newobj=b'\x80\x02' + SYSTEM + CMD + b'\x85\x81',
    newobj_ex=b'\x80\x04' + s4('subprocess') + s4('Popen') + b'\x93)}\x92',
    persistent=b'Pcanary\n',
    binary_persistent=CMD + b'Q',
    extension=b'\x82\x01',
    extension_4=b'\x84\x01\x00\x00\x00',
    buffer=b'\x80\x05\x97',
)
KNOWN_NAMES = dict(  # names the reader knows, used for something else
    chumpy_setstate=old_object(CH) + b'(dS"__setstate__"\n' + SYSTEM + b'sb' + CMD + b'b',
    chumpy_data=old_object(CH) + b'(dS"x"\n' + call('os', 'system', CMD) + b'sb',
    chumpy_other=g('chumpy.ch', 'MatVecMult'),
    chumpy_args=b'\x80\x02' + g(*CH) + CMD + b'\x85\x81',
    chumpy_call=call(*CH, CMD),
    class_state=g(*CH) + b'(dS"__reduce__"\nNsb',
    function_state=g('numpy.core.multiarray', '_reconstruct') + b'N}S"__doc__"\nNs\x86b',
    reconstructor=old_object(('builtins', 'object'), ('builtins', 'object')),
    reconstructor_base=old_object(CH, ('builtins', 'set'), b'(l'),
    reconstruct_other=call('numpy.core.multiarray', '_reconstruct', g(*CH), b'(I0\ntS"b"\n'),
    encode_other=call('_codecs', 'encode', b'S"x"\nS"unicode_escape"\n'),
    encode_registered=call('_codecs', 'encode', b'S"x"\nS"canary"\n'),
    codecs_lookup=call('_codecs', 'lookup', b'S"canary"\n'),
    set_of_trap=call('builtins', 'set', call('os', 'system', CMD)),
    call_text=b'S"os.system"\n(' + CMD + b'tR',
    call_result=call('builtins', 'set', b'(l') + b'(' + CMD + b'tR',
    shadow=call('numpy.core.multiarray', 'scalar', SYSTEM, CMD),
)
EVIL = {name: body + b'.' for name, body in (ORDERS | INSTRUCTIONS | KNOWN_NAMES).items()}


def claims(code, size, rest=b'xx'):
    "An instruction of a protocol that announces so many bytes."
    return code + struct.pack('<Q', size) + rest + b'.'


def thing(cls, **state):
    "An object in a pickle of Python 2."
    return ff.Python2(2).dumps(ff.Made(*cls, **state))


def csc(shape, data, indices, indptr):
    "A sparse matrix that does not add up."
    arrays = dict(data=np.zeros(data), indices=np.array(indices, int), indptr=np.array(indptr, int))
    return thing(CSC, _shape=shape, **arrays)


def select(idxs, shape):
    return thing(SELECT, a=np.zeros(3), idxs=np.array([idxs]), preferred_shape=shape)


MILLION = 10**6
BOMBS = dict(
    declared=ARR.replace(b'(K\x03t', b'(I1000000000000\nt'),
    huge_tuple=ARR.replace(b'(K\x03t', b'(' + b'M\xff\xff' * 9 + b't'),
    negative=ARR.replace(b'(K\x03t', b'(I-1\nt'),
    object_bytes=ARR.replace(b'U\x02f8', b'U\x02O8'),
    fields=ARR.replace(b'U\x02f8', b'U\x04V999'),
    long_double=ARR.replace(b'U\x02f8', b'U\x03f16'),
    bytearray=claims(b'\x80\x05\x96', 10**12),
    binbytes=claims(b'\x80\x04\x8e', 10**12),
    text=claims(b'\x80\x04\x8d', 10**12),
    frame=claims(b'\x80\x04\x95', 2**62, b'N'),
    long=b'\x80\x02\x8b' + struct.pack('<i', 2**31 - 1) + b'1.',
    memo=b'Nr\xff\xff\xff\xff0.',
    memo_text=b'Np99999999999999\n0.',
    digits=b'L' + b'9' * MILLION + b'L\n.',
    digits_int=b'I' + b'9' * MILLION + b'\n.',
    deep_key=b'}(N' + b'\x85' * MILLION + b'Nsu.',
    deep_list=b']' * MILLION + b'a' * (MILLION - 1) + b'.',
    deep_set=b'\x80\x04\x8f(N' + b'\x85' * MILLION + b'\x90.',
    copies=b'X'
    + struct.pack('<I', MILLION)
    + b'x' * MILLION
    + b'q\x00'
    + g('_codecs', 'encode')
    + b'q\x010'
    + b'h\x01h\x00U\x06latin1\x86R' * 5000
    + b't.',
    sparse=csc((MILLION, MILLION), 0, [], np.zeros(MILLION + 1)),
    sparse_wrap=csc((5, 1), 1, [0], [-(10**12), 1]),
    sparse_out=csc((5, 1), 1, [7], [0, 1]),
    select_out=select(9, (1,)),
    select_shape=select(1, (10**9, 10**9)),
    itself=thing(CH, y=1),
)

'x'.encode('raw_unicode_escape')  # a codec Python fetches when first used
HEARD, LISTENING = [], []


ALARMS = (
    'os.system subprocess.Popen os.exec os.posix_spawn exec pickle.find_class ctypes.dlopen '
    'socket.connect os.remove'
).split()
STRANGE_MODULES = 'canary', 'canary_module', 'subprocess', 'chumpy', 'this'


def is_alarm(event, args):
    "Whether something runs, is written or is imported that no reader needs."
    if event == 'open':
        return isinstance(args[1], str) and bool(set(args[1]) & set('wax+'))
    if event == 'import':
        return args[0].split('.')[0] in STRANGE_MODULES
    return event in ALARMS


def listen(event, args):
    if LISTENING and is_alarm(event, args):
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
    path = tmp_path / 'generic_model.pkl'
    read = load_flame
    if where == 'model':
        evil = write(path, EVIL[kind])
    elif where == 'masks':
        ff.write_original(path, SMALL)
        evil = write(tmp_path / 'FLAME_masks.pkl', EVIL[kind])

        def read(_):
            return load_flame(path)

    else:
        evil = write_npy(tmp_path / f'x.{where}', EVIL[kind])
        read = read_arrays if where == 'npy' else load_flame
    text = refused(evil, read, canary)
    assert 'refused' in text or kind == 'call_result', text


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


def zipped(path, members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def npy(shape, data=b'', descr='<f8'):
    "A file of numpy's that claims a shape."
    file = io.BytesIO()
    header = dict(descr=descr, fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


def test_npz_sizes_that_lie(tmp_path, canary):
    huge = zipped(tmp_path / 'huge.npz', {'v_template.npy': npy((10**12, 3))})
    assert 'needs' in refused(huge, load_flame, canary)
    bomb = npy((10**6, 100), bytes(8 * 10**8))
    bomb = zipped(tmp_path / 'bomb.npz', {'v_template.npy': bomb})
    assert 'unfolds to' in refused(bomb, lambda p: read_arrays(p, limit=10**8), canary)
    cut = zipped(tmp_path / 'cut.npz', {'v_template.npy': npy((100,), bytes(800))})
    cut.write_bytes(cut.read_bytes()[:-30])
    refused(cut, load_flame, canary)
    refused(write(tmp_path / 'x.npy', npy((10**12,))), read_arrays, canary)
    big = tmp_path / 'big.pkl'
    big.touch()
    big.open('r+b').truncate(10**10)
    assert '10,000,000,000 bytes' in refused(big, load_flame, canary)


def test_npz_tricks(tmp_path, canary):
    eight = npy((1,), bytes(8))
    outside = {'../CANARY.npy': eight, '/CANARY.npy': eight}
    refused(zipped(tmp_path / 'path.npz', outside), load_flame, canary)
    assert not (tmp_path.parent / 'CANARY.npy').exists()
    header = b"{'descr': __import__('canary').sing(), 'shape': (1,)}".ljust(64)
    header = {'v_template.npy': b'\x93NUMPY\x01\x00\x40\x00' + header}
    refused(zipped(tmp_path / 'header.npz', header), load_flame, canary)
    fields = {'v_template.npy': npy((1,), bytes(8), [('a', 'O')])}
    refused(zipped(tmp_path / 'fields.npz', fields), load_flame, canary)
    of_torch = zipped(tmp_path / 'torch.npz', {'archive/data.pkl': EVIL['os_system']})
    assert 'without arrays' in refused(of_torch, load_flame, canary)


SOUND = dict(a=np.eye(3), b=scipy.sparse.csc_matrix(np.eye(3)), c={1, 2}, d='x')
TO_DAMAGE = [
    GOOD[:4000] + GOOD[-300:],
    ff.Python2(0).dumps(ff.original(ff.model(columns=1)))[:6000],
    pickle.dumps(SOUND, 4),
    EVIL['chumpy_data'],
    EVIL['dotted_protocol_4'],
]


def damage(data, b):
    "Change a byte, cut a piece out or double it."
    i, j = sorted(data.draw(st.tuples(*[st.integers(0, len(b))] * 2)))
    how = data.draw(st.sampled_from(['set', 'cut', 'double']))
    if how == 'set' and i < len(b):
        b[i] = data.draw(st.integers(0, 255))
    elif how == 'cut' and j - i < 200:
        del b[i:j]
    elif how == 'double' and j - i < 200:
        b[i:i] = b[i:j]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage(data):
    """Bytes changed, cut out or doubled anywhere: an error in one sentence, or a value; never
    anything else."""
    b = bytearray(data.draw(st.sampled_from(TO_DAMAGE)))
    for _ in range(data.draw(st.integers(1, 4))):
        damage(data, b)
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
