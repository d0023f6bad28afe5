"""Retargeting: bounds, neutrals, heads without names, recordings, films."""

import json
import math
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import axis_angle_to_mat
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.clips import Frame
from spatialavatar0.use.animate import TURNS, motions_for, pose_of, talk
from spatialavatar0.use.retarget import (
    MOVES,
    across,
    face_points,
    performance,
    read_arkit,
    retarget,
    stacked,
    unstacked,
)
from test_viewer import flame_like

needs_mediapipe = pytest.mark.skipif(
    find_spec('mediapipe') is None, reason='needs the extra `track`'
)


@pytest.fixture(scope='module')
def head():
    return open_head()


@pytest.fixture(scope='module')
def poses(head):
    return [pose_of(head, f) for f in talk(50, seed=1)]


def test_tables_and_back(poses):
    for a, b in zip(poses, unstacked(stacked(poses))):
        assert set(a) == set(b)
        assert all(torch.equal(a[k], b[k]) for k in a)
    gap = stacked([dict(expr=torch.ones(3)), dict(neck=torch.ones(1, 3))])
    assert gap['expr'].tolist() == [[1] * 3, [0] * 3]
    assert gap['neck'].tolist() == [[0] * 3, [1] * 3]


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 3), st.integers(0, 10**6))
def test_limits_hold_for_any_motion(gain, seed):
    g = torch.Generator().manual_seed(seed)
    h = open_head()
    wild = unstacked(
        dict(
            expr=torch.randn(12, 52, generator=g),
            jaw=torch.randn(12, 3, generator=g),
            eyes=torch.randn(12, 6, generator=g),
            neck=3 * torch.randn(12, 3, generator=g),
        )
    )
    x = stacked(retarget(wild, h, gain=gain))
    assert 0 <= x['expr'].min()
    assert x['expr'].max() <= 1
    assert x['jaw'][:, 0].min() >= 0
    assert x['jaw'].abs().max() <= 0.5
    assert x['neck'].abs().max() <= math.radians(40) + 1e-6


@pytest.mark.parametrize('how', ['low', 'mean', 'median'])
def test_whoever_rests_rests(head, how):
    p = dict(head.arkit(dict(mouthFrownLeft=0.4, jawOpen=0.2)), neck=torch.tensor([0.1, 0.2, 0]))
    still = stacked(retarget([p] * 8, head, how))
    assert all(float(v.abs().max()) < 1e-6 for v in still.values())


def test_gain_of_one_part_leaves_the_others(head, poses):
    a = stacked(retarget(poses, head))
    b = stacked(retarget(poses, head, gain=dict(neck=0.0)))
    assert not b['neck'].any()
    assert all(torch.equal(a[k], b[k]) for k in ('expr', 'jaw', 'eyes'))


def test_signed_codes(head):
    f = flame_like()
    codes = unstacked(
        dict(expr=torch.randn(40, 52, generator=torch.Generator().manual_seed(0)) + 0.5)
    )
    x = stacked(retarget(codes, f))['expr']
    assert x.min() < 0
    assert float(x.median(0).values.abs().max()) < 0.2


def test_between_heads_needs_points_and_keeps_identity(head, poses):
    theirs = across(poses[:8], head, head, neutral={})
    assert set(theirs[0]) <= set(MOVES)
    with torch.no_grad():
        a, b = (
            torch.cat(
                [
                    face_points(head, head(**{k: v for k, v in p.items() if k in ('expr', 'jaw')}))
                    for p in m
                ]
            )
            for m in (poses[:8], theirs)
        )
    assert float((a - b).norm(dim=-1).mean()) < 3e-4  # onto itself: a third of a millimetre
    bigger = dict(shape=torch.full((1, 100), 0.3))
    x = across(poses[:4], head, head, driven_is=bigger)
    assert 'shape' not in x[0] and len(x) == 4


def test_turns_beyond_half(head):
    "Quaternions of either sign, and a camera that looks from behind."
    for yaw in (0.0, 2.0, 3.0):
        V = torch.eye(4)
        V[:3, :3] = axis_angle_to_mat(torch.tensor([0.0, yaw, 0]))
        frames = [
            Frame(
                torch.zeros(2, 2, 3),
                torch.zeros(2, 2),
                V,
                torch.eye(3),
                dict(neck=torch.tensor([[0.0, a, 0]])),
            )
            for a in (-0.4, 0, 0.4)
        ]
        assert stacked(performance(frames))['neck'][:, 1].tolist() == pytest.approx(
            [-0.4, 0, 0.4], abs=1e-5
        )


def test_motions_of_a_head_without_names():
    f = flame_like()
    made = motions_for(f, 30)
    assert set(made) == {'look', 'nod'}
    for m in made.values():
        assert all(set(x) <= set(TURNS) for x in m)
        pose_of(f, m[10])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(['csv', 'json']))
def test_recordings_never_crash(tmp_path_factory, data, kind):
    p = tmp_path_factory.mktemp('fuzz', numbered=True) / f'a.{kind}'
    p.write_bytes(data)
    try:
        read_arkit(p)
    except InputError:
        pass


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(
                st.sampled_from(['frames', 'names', 'fps', 'facsNames', 'weightMat', 'jawOpen']),
                x,
                max_size=4,
            )
        ),
    )
)
def test_any_json_is_refused_or_read(tmp_path_factory, d):
    p = tmp_path_factory.mktemp('fuzz', numbered=True) / 'a.json'
    p.write_text(json.dumps(d))
    try:
        motion, fps = read_arkit(p)
        assert motion and fps > 0
    except InputError:
        pass
