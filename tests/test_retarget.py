"""Retargeting: bounds, neutrals, heads without names."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_viewer import flame_like

from spatialavatar0.ground.geometry import axis_angle_to_mat
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.clips import Frame
from spatialavatar0.use.animate import TURNS, motions_for, pose_of, talk
from spatialavatar0.use.retarget import (
    MOVES,
    face_points,
    performance,
    retarget,
    retarget_across,
    stacked,
    unstacked,
)


@pytest.fixture(scope='module')
def head():
    return open_head()


@pytest.fixture(scope='module')
def poses(head):
    return [pose_of(head, controls) for controls in talk(50, seed=1)]


def test_tables_and_back(poses):
    for pose, again in zip(poses, unstacked(stacked(poses))):
        assert set(pose) == set(again)
        assert all(torch.equal(pose[name], again[name]) for name in pose)
    gap = stacked([dict(expr=torch.ones(3)), dict(neck=torch.ones(1, 3))])
    assert gap['expr'].tolist() == [[1] * 3, [0] * 3]
    assert gap['neck'].tolist() == [[0] * 3, [1] * 3]


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 3), st.integers(0, 10**6))
def test_limits_hold_for_any_motion(gain, seed):
    generator = torch.Generator().manual_seed(seed)
    wild = dict(
        expr=torch.randn(12, 52, generator=generator),
        jaw=torch.randn(12, 3, generator=generator),
        eyes=torch.randn(12, 6, generator=generator),
        neck=3 * torch.randn(12, 3, generator=generator),
    )
    moved = stacked(retarget(unstacked(wild), open_head(), gain=gain))
    assert 0 <= moved['expr'].min()
    assert moved['expr'].max() <= 1
    assert moved['jaw'][:, 0].min() >= 0
    assert moved['jaw'].abs().max() <= 0.5
    assert moved['neck'].abs().max() <= math.radians(40) + 1e-6


@pytest.mark.parametrize('how', ['low', 'mean', 'median'])
def test_whoever_rests_rests(head, how):
    frown = head.arkit(dict(mouthFrownLeft=0.4, jawOpen=0.2))
    pose = dict(frown, neck=torch.tensor([0.1, 0.2, 0]))
    still = stacked(retarget([pose] * 8, head, how))
    assert all(float(values.abs().max()) < 1e-6 for values in still.values())


def test_gain_of_one_part_leaves_the_others(head, poses):
    moved = stacked(retarget(poses, head))
    stiff = stacked(retarget(poses, head, gain=dict(neck=0.0)))
    assert not stiff['neck'].any()
    assert all(torch.equal(moved[name], stiff[name]) for name in ('expr', 'jaw', 'eyes'))


def test_signed_codes():
    generator = torch.Generator().manual_seed(0)
    codes = unstacked(dict(expr=torch.randn(40, 52, generator=generator) + 0.5))
    expr = stacked(retarget(codes, flame_like()))['expr']
    assert expr.min() < 0
    assert float(expr.median(0).values.abs().max()) < 0.2


def points_of(head, motion):
    "The 51 points of each pose, without the neck's turn."
    faces = [{name: pose[name] for name in ('expr', 'jaw') if name in pose} for pose in motion]
    with torch.no_grad():
        return torch.cat([face_points(head, head(**face)) for face in faces])


def test_between_heads_needs_points_and_keeps_identity(head, poses):
    theirs = retarget_across(poses[:8], head, head, neutral={})
    assert set(theirs[0]) <= set(MOVES)
    misses = (points_of(head, poses[:8]) - points_of(head, theirs)).norm(dim=-1)
    assert float(misses.mean()) < 3e-4  # onto itself: a third of a millimetre
    bigger = dict(shape=torch.full((1, 100), 0.3))
    driven = retarget_across(poses[:4], head, head, driven_is=bigger)
    assert 'shape' not in driven[0]
    assert len(driven) == 4


@pytest.mark.parametrize('yaw', [0.0, 2.0, 3.0])
def test_turns_beyond_half(yaw):
    "Quaternions of either sign, and a camera that looks from behind."
    viewmat = torch.eye(4)
    viewmat[:3, :3] = axis_angle_to_mat(torch.tensor([0.0, yaw, 0]))
    angles = [-0.4, 0, 0.4]
    necks = [torch.tensor([[0.0, angle, 0]]) for angle in angles]
    image = torch.zeros(2, 2, 3)
    mask = torch.zeros(2, 2)
    frames = [Frame(image, mask, viewmat, torch.eye(3), dict(neck=neck)) for neck in necks]
    found = stacked(performance(frames))['neck'][:, 1]
    assert found.tolist() == pytest.approx(angles, abs=1e-5)


def test_motions_of_a_head_without_names():
    nameless = flame_like()
    made = motions_for(nameless, 30)
    assert set(made) == {'look', 'nod'}
    for motion in made.values():
        assert all(set(controls) <= set(TURNS) for controls in motion)
        pose_of(nameless, motion[10])
