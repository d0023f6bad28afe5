"""The .glb by independent readers and its own rules; bad input."""

import json
import os
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from spatialavatar0.avatar.avatar import new_avatar
from spatialavatar0.ground.core import InputError
from spatialavatar0.head.head import open_head
from spatialavatar0.use.gltf import baked_texture, corners_of, morph_targets, read_glb, write_glb
from test_viewer import flame_like


@pytest.fixture(scope='module')
def avatar():
    a = new_avatar(open_head(), 40, torch.randn(1, 60, generator=torch.Generator().manual_seed(0)))
    return replace(
        a,
        splats=dict(
            a.splats, sh0=torch.rand(len(a), 3, generator=torch.Generator().manual_seed(1))
        ),
    )


@pytest.fixture(scope='module')
def file(avatar, tmp_path_factory):
    return write_glb(avatar, tmp_path_factory.mktemp('glb') / 'a.glb', size=64)


def test_trimesh_sees_the_same_head(avatar, file):
    trimesh = pytest.importorskip(
        'trimesh', reason='trimesh is an independent reader, used only here'
    )
    m = next(iter(trimesh.load(file).geometry.values()))
    vid, uid, triangles = corners_of(avatar.head)
    h = avatar.head
    assert np.allclose(m.vertices, avatar.verts()[vid], atol=1e-6)
    assert np.array_equal(m.faces, triangles)
    uv = h.uv[uid].numpy()
    assert np.allclose(
        m.visual.uv, np.stack([uv[:, 0], 1 - uv[:, 1]], -1), atol=1e-6
    )  # trimesh counts v upwards
    assert np.array_equal(
        np.asarray(m.visual.material.baseColorTexture.convert('RGB')), baked_texture(avatar, 64)
    )


def test_targets_names_and_limits(avatar, file):
    g, array = read_glb(file)
    mesh = g['meshes'][0]
    p = mesh['primitives'][0]
    vid = corners_of(avatar.head)[0]
    want = morph_targets(avatar)
    assert mesh['extras']['targetNames'] == list(want) == avatar.head.arkit_names
    assert len(mesh['weights']) == 52
    for t, (name, d) in zip(p['targets'], want.items()):
        a = g['accessors'][t['POSITION']]
        x = array(t['POSITION'])
        assert np.allclose(x, d[vid], atol=2e-7), name
        assert np.allclose(a['min'], x.min(0))
        assert np.allclose(a['max'], x.max(0))
    w = array(p['attributes']['WEIGHTS_0'])
    assert np.allclose(w.sum(1), 1, atol=1e-6)
    assert array(p['attributes']['JOINTS_0']).max() < 5
    assert np.allclose(np.linalg.norm(array(p['attributes']['NORMAL']), axis=1), 1, atol=1e-4)


def test_chunks_lie_as_they_should(file):
    data = file.read_bytes()
    total = struct.unpack('<I', data[8:12])[0]
    n = struct.unpack('<I', data[12:16])[0]
    g = json.loads(data[20 : 20 + n])
    assert total == len(data)
    assert n % 4 == 0
    assert (
        g['buffers'][0]['byteLength']
        == struct.unpack('<I', data[20 + n : 24 + n])[0]
        == len(data) - 28 - n
    )
    assert all(
        v['byteOffset'] % 4 == 0
        and v['byteOffset'] + v['byteLength'] <= g['buffers'][0]['byteLength']
        for v in g['bufferViews']
    )


def test_motions(avatar, tmp_path):
    m = dict(
        one=[dict(jawOpen=0.5), dict(eyesYaw=20)],
        turn=[dict(neckYaw=10), dict(neckYaw=20)],
        none=[],
    )
    g, array = read_glb(write_glb(avatar, tmp_path / 'a.glb', m, 16, fps=10))
    a = {x['name']: x for x in g['animations']}
    assert set(a) == {'one', 'turn'}

    def paths(n):
        return sorted((c['target']['node'], c['target']['path']) for c in a[n]['channels'])

    assert paths('one') == [(3, 'rotation'), (4, 'rotation'), (5, 'weights')]
    assert paths('turn') == [(1, 'rotation')]
    q = array(a['turn']['samplers'][0]['output'])
    assert np.allclose(q[1], [0, np.sin(np.radians(10)), 0, np.cos(np.radians(10))], atol=1e-6)
    assert np.allclose(array(a['turn']['samplers'][0]['input'])[:, 0], [0, 0.1])


def test_a_head_without_names(tmp_path):
    h = flame_like()
    a = new_avatar(h, 24)
    g, array = read_glb(write_glb(a, tmp_path / 'a.glb', size=16))
    names = g['meshes'][0]['extras']['targetNames']
    assert names[:2] == ['expr0', 'expr1']
    assert len(names) == 50
    assert {x['name'] for x in g['animations']} == {'look', 'nod'}
    assert np.allclose(
        array(g['meshes'][0]['primitives'][0]['targets'][3]['POSITION']),
        h.expr_basis[3][corners_of(h)[0]],
        atol=2e-7,
    )


def test_bad_input(avatar, tmp_path, monkeypatch):
    with pytest.raises(InputError, match='end in .glb'):
        write_glb(avatar, tmp_path / 'a.gltf')
    with pytest.raises(InputError, match='is not a control'):
        write_glb(avatar, tmp_path / 'a.glb', dict(m=[dict(grin=1)]))
    with pytest.raises(InputError, match='no UV layout'):
        write_glb(
            replace(avatar, binding=replace(avatar.binding, resolution=0)), tmp_path / 'a.glb'
        )
    path = write_glb(avatar, tmp_path / 'a.glb', {}, 16)
    old = path.read_bytes()
    monkeypatch.setattr(
        'spatialavatar0.use.gltf.baked_texture',
        lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()),
    )
    with pytest.raises(KeyboardInterrupt):
        write_glb(avatar, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ['a.glb']


def test_damaged_files_never_crash(file, tmp_path):
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    n = struct.unpack('<I', good[12:16])[0]
    for i in range(300):
        data = bytearray(good)
        for at in rng.integers(0, 28 + n, rng.integers(1, 5)):
            data[at] = rng.choice([rng.integers(256), ord('9'), ord('-'), ord('"')])
        (tmp_path / 'b.glb').write_bytes(data[: rng.integers(len(data))] if i % 5 == 0 else data)
        try:
            g, array = read_glb(tmp_path / 'b.glb')
            for k in range(8):
                array(k)
        except InputError:
            pass
