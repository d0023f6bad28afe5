"""Stage 2: bounds, gradients, kill -9 and resume, what stops it, other heads."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import flame_files as ff
import numpy as np
import pytest
import torch

from spatialavatar0.avatar.avatar import new_avatar
from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import intrinsics, look_at
from spatialavatar0.head.flame_files import load_flame
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.clips import Clip
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.splats.kernels import fast_log_aspects
from spatialavatar0.stage2.loop import (
    NotFinite,
    Refinement,
    fast_aspect_loss,
    fast_keep_loss,
    measure,
    refine,
)
from spatialavatar0.stage2.refine import (
    RAW,
    RefineConfig,
    aspect_loss,
    clamp_scales,
    keep_loss,
    light_share,
    paper_config,
    refine_readable,
    start_frame,
    texel_neighbours,
)

CONFIG = RefineConfig(freeze=4, aspect_from=4)


@pytest.fixture(scope='module')
def clip():
    return Clip(mono_clip(make_person(2), 12, 64, seed=1).frames)


@pytest.fixture(scope='module')
def start(clip):
    return from_frame(clip[start_frame(clip)], 32)


def same(one, other):
    return all(torch.equal(one.splats[k], other.splats[k]) for k in RAW)


def test_layout_stays_and_seeds_decide(start, clip):
    one, log = refine(start, clip, 12, config=CONFIG, seed=3)
    again, _ = refine(start, clip, 12, config=CONFIG, seed=3)
    other, _ = refine(start, clip, 12, config=CONFIG, seed=4)
    assert same(one, again)
    assert not same(one, other)
    assert len(one) == len(start)
    for name in ('face_ids', 'bary', 'texels'):
        assert torch.equal(getattr(one.binding, name), getattr(start.binding, name))
    assert not same(one, start)
    assert [line['step'] for line in log] == [0, 11]
    assert list(log[0]) == ['step', 'loss', 'psnr', 'seconds']
    assert measure(one, clip)['psnr'] > measure(start, clip)['psnr']


def test_the_readable_loop_goes_the_same_way(start, clip):
    "Frames are floats there and bytes here, so the two differ by half a level of colour."
    fast, _ = refine(start, clip, 8, config=CONFIG, seed=3)
    readable = refine_readable(start, clip, 8, CONFIG, seed=3)
    for k in RAW:
        moved = (readable.splats[k] - start.splats[k]).abs().mean()
        apart = (readable.splats[k] - fast.splats[k]).abs().mean()
        assert apart < 0.1 * moved


def test_an_avatar_behind_the_camera_is_named(start, clip):
    away = replace(clip[3], viewmat=torch.diag(torch.tensor([-1.0, 1, -1, 1])) @ clip[3].viewmat)
    with pytest.raises(InputError, match='frame 3 shows none of the'):
        measure(start, Clip([clip[2], away]))


def test_scales_stand_still_then_move_within_bounds(start, clip):
    rates = dict(CONFIG.lr, log_scales=0.5)
    run = Refinement(start, clip, replace(CONFIG, spread=0.7, grow=0.2, lr=rates), 12)
    for _ in range(4):
        run.step()
        assert torch.equal(run.splats()['log_scales'], start.splats['log_scales'])
    for _ in range(8):
        run.step()
        scales = run.splats()['log_scales']
        assert (scales.amax(-1) - scales.amin(-1)).max() <= 1.4 + 1e-4
    assert not torch.equal(scales, start.splats['log_scales'])


def test_clamp_bounds_the_ratio():
    dice = torch.Generator().manual_seed(0)
    begun = torch.randn(500, 3, generator=dice)
    held = clamp_scales(5 * torch.randn(500, 3, generator=dice), begun, 1.0, 2.0)
    assert (held.amax(-1) - held.amin(-1)).max() <= 2 + 1e-5  # whatever came in: at most e^2
    # clipping moves the mean: only what needed none stays
    inside = (held - held.mean(-1, keepdim=True)).abs().amax(-1) <= 1
    assert torch.allclose(clamp_scales(held, held, 1.0, 2.0)[inside], held[inside], atol=1e-5)


RUN = """
import sys, time
from spatialavatar0.avatar.avatar import load_avatar
from spatialavatar0.pictures.clips import Clip
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.stage2.loop import Refinement, calm
from spatialavatar0.stage2.refine import RefineConfig

start, state, stop, out = sys.argv[1:]
clip = Clip(mono_clip(make_person(2), 12, 64, seed=1).frames)
config = RefineConfig(freeze=4, aspect_from=4)
run = Refinement(load_avatar(start), clip, config, 16, seed=5)
try:
    run.load(state)
except ValueError:
    pass
with calm(64 * 64):
    while run.step_number < 16:
        if run.step_number % 3 == 0:
            run.save(state)
            print(run.step_number, flush=True)
        if run.step_number == int(stop):
            time.sleep(60)
        run.step()
run.result().save(out)
"""


def test_killed_and_resumed(start, tmp_path):
    """kill -9 in the middle of a run; the same call goes on and ends where an undisturbed one does,
    to the last bit."""
    first = tmp_path / 'start.safetensors'
    start.save(first)
    env = dict(os.environ, NUMBA_NUM_THREADS='1', OMP_NUM_THREADS='1')

    def call(state, stop, out):
        words = first, tmp_path / state, stop, tmp_path / out
        return dict(args=[sys.executable, '-c', RUN, *map(str, words)], env=env, text=True)

    killed = subprocess.Popen(**call('killed', 10, 'none'), stdout=subprocess.PIPE)
    assert any(line.strip() == '9' for line in killed.stdout)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / 'none').exists()
    resumed = subprocess.run(**call('killed', -1, 'resumed'), check=True, capture_output=True)
    assert resumed.stdout.split() == ['9', '12', '15']
    subprocess.run(**call('whole', -1, 'whole.safetensors'), check=True, capture_output=True)
    assert (tmp_path / 'resumed').read_bytes() == (tmp_path / 'whole.safetensors').read_bytes()


def test_state_of_another_run_is_refused(start, clip, tmp_path):
    state = tmp_path / 's.safetensors'
    refine(start, clip, 2, config=CONFIG, state=state)
    with pytest.raises(InputError, match='other work: .*seed'):
        refine(start, clip, 2, config=CONFIG, state=state, seed=1)
    with pytest.raises(InputError, match='other work'):
        refine(start, clip, 2, config=paper_config(), state=state)
    with pytest.raises(InputError, match='iters'):
        refine(start, clip, 3, config=CONFIG, state=state)
    state.write_bytes(b'not a state')
    with pytest.raises(InputError, match='not the state of a refinement'):
        refine(start, clip, 2, config=CONFIG, state=state)


def test_interrupt_keeps_what_is_there(start, clip, tmp_path, capsys):
    def stop(step, avatar):
        raise KeyboardInterrupt

    state = tmp_path / 's.safetensors'
    stopped, log = refine(start, clip, 12, config=CONFIG, callback=stop, state=state)
    assert not same(stopped, start)
    assert len(log) == 1
    assert 'stopped after 1 of 12 steps' in capsys.readouterr().out
    resumed, _ = refine(start, clip, 12, config=CONFIG, state=state)
    whole, _ = refine(start, clip, 12, config=CONFIG)
    assert same(resumed, whole)


def test_nan_is_named_and_harms_nothing(start, clip, tmp_path):
    run = Refinement(start, clip, CONFIG, 12)
    run.step()
    run.delta['quats'].data[7] = torch.nan
    with pytest.raises(InputError, match='quats'):
        run.step()  # the rasterizer names it
    ill = replace(CONFIG, l1=math.nan)
    run = Refinement(start, clip, ill, 12)
    with pytest.raises(NotFinite, match='loss.* at step 0, frame'):
        run.step()
    assert all(torch.equal(v, start.splats[k]) for k, v in run.splats().items())
    with pytest.raises(NotFinite):
        refine(start, clip, 5, config=ill, state=tmp_path / 's.safetensors')
    assert (tmp_path / 's.safetensors').exists()


def test_a_head_behind_the_camera_is_named(start, clip):
    viewmat = clip[4].viewmat.clone()
    viewmat[2, 3] -= 10
    frames = [clip[i] for i in range(6)]
    frames[4] = replace(frames[4], viewmat=viewmat)
    with pytest.raises(InputError, match='in frame 4 the head lies behind the camera'):
        refine(start, Clip(frames), 40, config=CONFIG)
    with pytest.raises(InputError, match='frame 4'):
        measure(start, Clip(frames))


def test_the_command_says_nan_in_one_line(clip, tmp_path, monkeypatch, capsys):
    "What a refinement cannot go on from is a user's matter: one line, no traceback."
    from spatialavatar0 import cli
    from spatialavatar0.pictures.clips import write_vhap
    from spatialavatar0.stage2 import loop

    write_vhap(clip[:10], tmp_path / 'clip')
    photo_loss = loop.photo_loss
    monkeypatch.setattr(loop, 'photo_loss', lambda *args: math.nan * photo_loss(*args))
    size = '--iters', '5', '--resolution', '16'
    words = ['refine', 'new', tmp_path / 'clip', '--out', tmp_path / 'out', *size]
    assert cli.main([str(word) for word in words]) == 1
    said = capsys.readouterr().err
    assert 'error: loss' in said and 'became nan or inf at step 0, frame' in said
    assert 'Traceback' not in said


def test_pictures_may_not_fit(start, clip):
    "Without room to keep pictures they are made again: the same result."
    kept, _ = refine(start, clip, 8, config=CONFIG)
    run = Refinement(start, clip, CONFIG, 8)
    run.room = 0
    made_again, _ = run.go()
    assert same(kept, made_again) and not run.views


def test_light_is_what_the_pictures_take(start, clip):
    share = light_share(start, clip)
    assert share.min() >= 0
    assert abs(float(share.mean()) - 1) < 1e-4
    assert float((share < 0.01).float().mean()) > 0.1


def test_neighbours(start):
    near = texel_neighbours(start.binding)
    texels = start.binding.texels
    for k, (dr, dc) in enumerate(((0, 1), (0, -1), (1, 0), (-1, 0))):
        i = (near[:, k] >= 0).nonzero()[:, 0]
        assert torch.equal(texels[near[i, k].long()], texels[i] + torch.tensor([dr, dc]))


@pytest.mark.parametrize('loss', (keep_loss, fast_keep_loss))
def test_keep_loss_by_differences(start, loss):
    near = texel_neighbours(start.binding)
    change = torch.randn(len(start), 2).requires_grad_()
    tie = torch.rand(len(start))
    (grad,) = torch.autograd.grad(loss(change, near, tie), change)

    def slope(place):
        one = torch.nn.functional.one_hot(torch.tensor(place), change.numel())
        step = 0.1 * one.reshape(change.shape)
        up, down = loss(change + step, near, tie), loss(change - step, near, tie)
        return (float(up) - float(down)) / 0.2

    places = [0, 7, 31]
    with torch.no_grad():
        numeric = torch.tensor([slope(place) for place in places])
    assert torch.allclose(grad.reshape(-1)[places], numeric, atol=1e-4)


def test_keep_loss_both_forms(start):
    near, tie = texel_neighbours(start.binding), torch.rand(len(start))
    change = torch.randn(len(start), 3)
    assert torch.allclose(keep_loss(change, near, tie), fast_keep_loss(change, near, tie))


def test_aspect_loss_both_forms(start, clip):
    "The fast form differentiates only the long splats; value and gradients are the same."
    found = []
    for loss in (aspect_loss, fast_aspect_loss):
        leaves = [x.detach().requires_grad_() for x in start.world(**clip[0].pose)[:3]]
        value = loss(*leaves, clip[0], 0.5)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert found[0][0] > 0
    for readable, fast in zip(*found):
        assert torch.allclose(readable, fast, atol=1e-3 * float(readable.abs().max()))


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_aspect_of_a_known_disc(dtype):
    "A disc of radii 3:1 seen from the front, from behind the camera, and edge-on."
    viewmat = look_at((0, 0, 2.0), (0, 0, 0)).to(dtype)
    K = intrinsics(200.0, 64, 64).to(dtype)
    half = math.sqrt(0.5)

    def log_ratio(z, quat):
        rows = (0, 0, z), quat, (0.03, 0.01, 0.001)
        disc = [torch.tensor([row], dtype=dtype) for row in rows]
        return float(fast_log_aspects(*disc, viewmat, K, 64, 64))

    assert abs(log_ratio(0, (1, 0, 0, 0)) - math.log(3)) < 1e-3
    assert log_ratio(5.0, (1, 0, 0, 0)) == -1
    turned = log_ratio(0, (half, 0, half, 0))  # about y: 1 mm by 10 mm
    assert abs(turned - math.log(10)) < 0.02


def test_start_frame(clip):
    def turned(jaw, yaw):
        pose = dict(
            jaw=torch.tensor([[jaw, 0.0, 0]]),
            rotation=torch.tensor([[0.0, yaw, 0]]),
            neck=torch.zeros(1, 3),
        )
        return replace(clip[0], params={**clip[0].params, **pose})

    many = Clip([turned(0.3, 0.0), turned(0.0, 0.5), turned(0.0, 0.1), *[turned(0.2, 0.0)] * 20])
    assert start_frame(many) == 2
    with pytest.raises(InputError, match='empty'):
        start_frame(Clip([]))


def test_a_flame_head(tmp_path, clip):
    "Stage 2 on a FLAME-format head that has neither regions nor an ARKit map."
    from spatialavatar0.head.flame_files import write_flame_folder

    write_flame_folder(open_head(), tmp_path / 'open')
    flame = load_flame(tmp_path / 'open')
    names = 'jaw', 'neck', 'rotation', 'eyes', 'translation'

    def without_expression(frame):
        return replace(frame, params={k: v for k, v in frame.params.items() if k in names})

    frames = Clip([without_expression(frame) for frame in clip[:4]])
    begun = new_avatar(flame, 24)
    refined, _ = refine(begun, frames, 8, config=CONFIG)
    assert measure(refined, frames)['psnr'] > measure(begun, frames)['psnr']
    assert refined.head is flame


def test_one_lit_texel_of_hair():
    """A start frame in which a single texel of hair is seen well: its colours have no spread, and
    once became nan."""
    from spatialavatar0.avatar.hair import strands

    rgb = torch.rand(6, 3)
    known = torch.tensor([1.0, 0, 0, 0, 0, 0])
    hair = torch.tensor([True] * 3 + [False] * 3)
    assert torch.equal(strands(rgb, known, torch.rand(6, 3), hair), rgb)


def test_an_offset_the_tracker_found_stays(clip):
    """A frame may come with a static offset: the first avatar wears it, and hair grows only where
    the matte still reaches farther."""
    truth = make_person(2).static_offset

    def first_avatar(offset):
        params = dict(clip[0].params, static_offset=offset[None])
        return from_frame(replace(clip[0], params=params), 24)

    worn, bald = first_avatar(truth), from_frame(clip[0], 24)
    assert torch.equal(first_avatar(0 * truth).static_offset, bald.static_offset)

    def distance(avatar):
        return (avatar.static_offset - truth).norm(dim=-1)

    assert distance(worn).max() < 0.015
    assert distance(worn).mean() < 0.5 * distance(bald).mean()


def blob(folder, V):
    "A FLAME-format head that is not a head: random vertices, an atlas, no regions."
    F = 2 * V - 20
    ff.write_original(folder / 'generic_model.pkl', ff.model(V, F))
    side = int(np.ceil(F**0.5))
    places = np.stack([np.arange(F) % side, np.arange(F) // side], -1)
    corners = [[0.1, 0.1], [0.9, 0.1], [0.1, 0.9]]
    uv = ((places[:, None] + corners) / side).reshape(-1, 2)
    np.savez(folder / 'uv.npz', vt=uv, ft=np.arange(3 * F).reshape(F, 3))
    return load_flame(folder)


def filmed(avatar, params, time):
    "A frame of an avatar that opens its jaw, from a camera that moves."
    from spatialavatar0.pictures.clips import Frame

    still = {k: torch.zeros(1, n) for k, n in dict(rotation=3, neck=3, eyes=6).items()}
    pose = dict(
        still,
        expr=torch.zeros(1, avatar.head.num_expr),
        jaw=torch.tensor([[0.02 * time, 0, 0]]),
        translation=torch.zeros(1, 3),
    )
    viewmat = look_at((0.3 * math.sin(0.6 * time), 0.05, 0.9), (0, 0, 0))
    camera = viewmat, intrinsics(70.0, 48, 48)
    rgb, alpha = avatar.render(*camera, 48, 48, background=0.0, **pose)
    return Frame(rgb.clamp(0, 1), alpha.clamp(0, 1), *camera, dict(pose, **params), time)


def film_of_a_blob(head, folder, seed, offset):
    "Ten frames on another head, written as a VHAP folder; the head's own parameters."
    from spatialavatar0.pictures.clips import write_vhap

    dice = torch.Generator().manual_seed(seed)
    params = dict(
        shape=torch.randn(1, head.num_shape, generator=dice),
        static_offset=0.005 * torch.randn(1, head.num_verts, 3, generator=dice) * offset,
    )
    truth = new_avatar(head, 32, params['shape'], params['static_offset'][0])
    truth.splats['sh0'] = torch.randn(len(truth), 3, generator=dice)
    write_vhap([filmed(truth, params, time) for time in range(10)], folder, head)
    return params


@pytest.mark.parametrize('V,offset', ((60, False), (84, True)))
def test_the_command_on_a_flame_head(tmp_path, V, offset):
    """A VHAP folder tracked with another head: `spatialavatar0 refine new CLIP --head MODEL`, and
    its avatar opens on that head."""
    from spatialavatar0 import cli
    from spatialavatar0.avatar.avatar import load_avatar

    (tmp_path / 'model').mkdir()
    head = blob(tmp_path / 'model', V)
    params = film_of_a_blob(head, tmp_path / 'clip', V, offset)
    size = '--iters', '30', '--resolution', '24'
    words = ['refine', 'new', tmp_path / 'clip', '--out', tmp_path / 'out', *size]
    args = [str(word) for word in words]
    assert cli.main([*args, '--head', str(tmp_path / 'model')]) == 0
    refined = load_avatar(tmp_path / 'out' / 'avatar.safetensors', head)
    numbers = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert torch.allclose(refined.static_offset, params['static_offset'][0], atol=1e-6)
    assert numbers['steps'] == 30
    assert numbers['refined']['psnr'] > numbers['start']['psnr'] + 1
    with pytest.raises(InputError, match='another head'):
        load_avatar(tmp_path / 'out' / 'avatar.safetensors')
    assert cli.main(args) == 1  # the folder says which head it was tracked with
