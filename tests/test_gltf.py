"""The .glb by independent readers and its own rules; bad input."""

import json
import os
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_viewer import flame_like

from spatialavatar0.avatar.avatar import new_avatar
from spatialavatar0.ground.core import InputError
from spatialavatar0.head.head import open_head
from spatialavatar0.use.gltf import baked_texture, corners_of, morph_targets, read_glb, write_glb


@pytest.fixture(scope='module')
def avatar():
    shape = torch.randn(1, 60, generator=torch.Generator().manual_seed(0))
    plain = new_avatar(open_head(), 40, shape)
    colors = torch.rand(len(plain), 3, generator=torch.Generator().manual_seed(1))
    return replace(plain, splats=dict(plain.splats, sh0=colors))


@pytest.fixture(scope='module')
def file(avatar, tmp_path_factory):
    return write_glb(avatar, tmp_path_factory.mktemp('glb') / 'a.glb', size=64)


def test_trimesh_sees_the_same_head(avatar, file):
    trimesh = pytest.importorskip(
        'trimesh', reason='trimesh is an independent reader, used only here'
    )
    mesh = next(iter(trimesh.load(file).geometry.values()))
    corners = corners_of(avatar.head)
    assert np.allclose(mesh.vertices, avatar.verts()[corners.vert_ids], atol=1e-6)
    assert np.array_equal(mesh.faces, corners.triangles)
    uv = avatar.head.uv[corners.uv_ids].numpy()
    uv[:, 1] = 1 - uv[:, 1]  # trimesh counts v upwards
    assert np.allclose(mesh.visual.uv, uv, atol=1e-6)
    texture = np.asarray(mesh.visual.material.baseColorTexture.convert('RGB'))
    assert np.array_equal(texture, baked_texture(avatar, 64))


def test_pygltflib_sees_what_ours_sees(file):
    pygltflib = pytest.importorskip('pygltflib')
    theirs = pygltflib.GLTF2().load(str(file))
    about, _ = read_glb(file)
    assert [node.name for node in theirs.nodes] == [node['name'] for node in about['nodes']]
    assert [a.count for a in theirs.accessors] == [a['count'] for a in about['accessors']]
    assert theirs.buffers[0].byteLength == len(theirs.binary_blob())
    motions = {motion.name: len(motion.channels) for motion in theirs.animations}
    assert motions == {motion['name']: len(motion['channels']) for motion in about['animations']}


def test_targets_names_and_limits(avatar, file):
    about, array = read_glb(file)
    mesh = about['meshes'][0]
    vert_ids = corners_of(avatar.head).vert_ids
    want = morph_targets(avatar)
    assert mesh['extras']['targetNames'] == list(want) == avatar.head.arkit_names
    assert len(mesh['weights']) == 52
    for target, (name, moves) in zip(mesh['primitives'][0]['targets'], want.items()):
        accessor = about['accessors'][target['POSITION']]
        rows = array(target['POSITION'])
        assert np.allclose(rows, moves[vert_ids], atol=2e-7), name
        assert np.allclose(accessor['min'], rows.min(0))
        assert np.allclose(accessor['max'], rows.max(0))


def test_attributes(file):
    about, array = read_glb(file)
    attributes = about['meshes'][0]['primitives'][0]['attributes']
    assert np.allclose(array(attributes['WEIGHTS_0']).sum(1), 1, atol=1e-6)
    assert array(attributes['JOINTS_0']).max() < 5
    assert np.allclose(np.linalg.norm(array(attributes['NORMAL']), axis=1), 1, atol=1e-4)


def test_chunks_lie_as_they_should(file):
    data = file.read_bytes()
    total, length = struct.unpack('<II', data[8:16])
    about = json.loads(data[20 : 20 + length])
    promised = about['buffers'][0]['byteLength']
    assert total == len(data)
    assert length % 4 == 0
    assert promised == struct.unpack('<I', data[20 + length : 24 + length])[0]
    assert promised == len(data) - 28 - length
    for view in about['bufferViews']:
        assert view['byteOffset'] % 4 == 0
        assert view['byteOffset'] + view['byteLength'] <= promised


def moved(motion):
    "Which node a motion moves, and how."
    targets = [channel['target'] for channel in motion['channels']]
    return sorted((target['node'], target['path']) for target in targets)


def test_motions(avatar, tmp_path):
    motions = dict(
        one=[dict(jawOpen=0.5), dict(eyesYaw=20)],
        turn=[dict(neckYaw=10), dict(neckYaw=20)],
        none=[],
    )
    about, array = read_glb(write_glb(avatar, tmp_path / 'a.glb', motions, 16, fps=10))
    written = {motion['name']: motion for motion in about['animations']}
    assert set(written) == {'one', 'turn'}
    assert moved(written['one']) == [(3, 'rotation'), (4, 'rotation'), (5, 'weights')]
    assert moved(written['turn']) == [(1, 'rotation')]
    sampler = written['turn']['samplers'][0]
    half_turn = np.radians(10)
    want = [0, np.sin(half_turn), 0, np.cos(half_turn)]
    assert np.allclose(array(sampler['output'])[1], want, atol=1e-6)
    assert np.allclose(array(sampler['input'])[:, 0], [0, 0.1])


def test_a_head_without_names(tmp_path):
    head = flame_like()
    about, array = read_glb(write_glb(new_avatar(head, 24), tmp_path / 'a.glb', size=16))
    mesh = about['meshes'][0]
    names = mesh['extras']['targetNames']
    assert names[:2] == ['expr0', 'expr1']
    assert len(names) == 50
    assert {motion['name'] for motion in about['animations']} == {'look', 'nod'}
    fourth = array(mesh['primitives'][0]['targets'][3]['POSITION'])
    assert np.allclose(fourth, head.expr_basis[3][corners_of(head).vert_ids], atol=2e-7)


def interrupted(*_):
    raise KeyboardInterrupt


def test_bad_input(avatar, tmp_path, monkeypatch):
    with pytest.raises(InputError, match='end in .glb'):
        write_glb(avatar, tmp_path / 'a.gltf')
    with pytest.raises(InputError, match='is not a control'):
        write_glb(avatar, tmp_path / 'a.glb', dict(m=[dict(grin=1)]))
    without_layout = replace(avatar, binding=replace(avatar.binding, resolution=0))
    with pytest.raises(InputError, match='no UV layout'):
        write_glb(without_layout, tmp_path / 'a.glb')
    path = write_glb(avatar, tmp_path / 'a.glb', {}, 16)
    old = path.read_bytes()
    monkeypatch.setattr('spatialavatar0.use.gltf.baked_texture', interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_glb(avatar, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ['a.glb']


def test_damaged_files_never_crash(file, tmp_path):
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    length = struct.unpack('<I', good[12:16])[0]
    for i in range(300):
        data = bytearray(good)
        for at in rng.integers(0, 28 + length, rng.integers(1, 5)):
            data[at] = rng.choice([rng.integers(256), ord('9'), ord('-'), ord('"')])
        (tmp_path / 'b.glb').write_bytes(data[: rng.integers(len(data))] if i % 5 == 0 else data)
        try:
            _, array = read_glb(tmp_path / 'b.glb')
            for accessor in range(8):
                array(accessor)
        except InputError:
            pass
