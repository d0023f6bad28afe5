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
    draw_view,
    fast_keep_loss,
    fast_photo_loss,
    look,
    measure,
    refine,
)
from spatialavatar0.stage2.refine import (
    RAW,
    REFINE_PRESETS,
    RefineConfig,
    aspect_loss,
    clamp_scales,
    fast_config,
    keep_loss,
    light_share,
    paper_config,
    photo_loss,
    quick_config,
    reference_frame,
    refine_readable,
    render_frame,
    start_frame,
    texel_neighbours,
    window_shift,
)

CONFIG = RefineConfig(freeze=4, aspect_from=4)


@pytest.fixture(scope='module')
def clip():
    return Clip(mono_clip(make_person(2), 12, 64, seed=1).frames)


@pytest.fixture(scope='module')
def start(clip):
    return from_frame(clip[start_frame(clip)], 32)


FAST = fast_config(freeze=4, aspect_from=4)


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
    photo_loss = loop.fast_photo_loss
    monkeypatch.setattr(loop, 'fast_photo_loss', lambda *args: math.nan * photo_loss(*args))
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


def test_aspect_term_comes_with_the_picture(start, clip):
    "The loop's picture and aspect term, and their gradients, are those of page 60."
    view, background = look(start, clip[0]), torch.tensor([0.2, 0.5, 0.9])
    found = []
    for fast in (True, False):
        raw = {k: start.splats[k].clone().requires_grad_() for k in RAW}
        if fast:
            rgb, ratios = draw_view(raw, view, background, True)
            term = (ratios - 0.5).relu().mean()
        else:
            rgb, world = render_frame(raw, view.mesh, view, background)
            term = aspect_loss(*world, view, 0.5)
        value = rgb.square().mean() + term
        found.append([term.detach(), *torch.autograd.grad(value, list(raw.values()))])
    assert found[0][0] > 0
    for fast, readable in zip(*found):
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


# ------------------------------------------------------------------------- cheaper, longer steps


def two_pictures(height=37, width=52):
    dice = torch.Generator().manual_seed(4)
    target = torch.rand(height, width, 3, generator=dice)
    noise = torch.randn(height, width, 3, generator=dice)
    return (target + 0.1 * noise).clamp(0, 1), target


def with_slope(loss, rgb, *args):
    rgb = rgb.clone().requires_grad_()
    value = loss(rgb, *args)
    return value.detach().double(), torch.autograd.grad(value, rgb)[0].double()


@pytest.mark.parametrize('changes', (dict(), dict(huber=0.05), dict(windows=2), dict(windows=3)))
@pytest.mark.parametrize('with_care', (False, True))
def test_photo_loss_both_forms(changes, with_care):
    "Compiled in float32, and the readable one in float64."
    rgb, target = two_pictures()
    care = (torch.rand(37, 52, generator=torch.Generator().manual_seed(1)) > 0.3).float()
    rest = RefineConfig(**changes), care if with_care else None
    for step in range(3):
        shift = window_shift(rest[0], 0, step)
        fast = with_slope(fast_photo_loss, rgb, target, *rest, shift, 0.3)
        slow = with_slope(photo_loss, rgb.double(), target.double(), *rest, shift)
        assert abs(fast[0] - 0.3 * slow[0]) < 1e-6
        assert (fast[1] - 0.3 * slow[1]).norm() <= 1e-5 * 0.3 * slow[1].norm()


@pytest.mark.parametrize('changes', (dict(l1=0), dict(huber=0.1), dict(huber=0.1, windows=2)))
def test_photo_loss_by_differences(changes):
    rgb, target = (x.double() for x in two_pictures(9, 11))
    cfg = RefineConfig(**changes)
    args = target, cfg, None, (cfg.windows - 1, 0)
    assert torch.autograd.gradcheck(lambda rgb: photo_loss(rgb, *args), rgb.requires_grad_())


def test_huber_by_hand():
    target = torch.full((20, 20, 3), 0.5)
    cfg = RefineConfig(l1=1, dssim=0, huber=0.1)
    for d, cost, slope in ((0.4, 0.35, 1), (-0.4, 0.35, -1), (0.05, 0.0125, 0.5), (0.0, 0, 0)):
        for loss in (photo_loss, fast_photo_loss):
            value, pull = with_slope(loss, target + d, target, cfg)
            assert float(value) == pytest.approx(cost, abs=1e-6)
            assert 1200 * pull.mean().item() == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize('loss', (photo_loss, fast_photo_loss))
def test_some_windows_have_no_bias(loss):
    rgb, target = two_pictures(31, 44)
    some, every = [RefineConfig(l1=0, windows=n) for n in (2, 1)]
    shifts = [(row, column) for row in (0, 1) for column in (0, 1)]
    parts = [with_slope(loss, rgb, target, some, None, shift) for shift in shifts]
    value, slope = [torch.stack(x).mean(0) for x in zip(*parts)]
    whole = with_slope(photo_loss, rgb.double(), target.double(), every)
    assert abs(value - whole[0]) < 1e-5
    assert (slope - whole[1]).norm() < 1e-4 * whole[1].norm()


def test_the_shift_is_random_and_repeats():
    some = RefineConfig(windows=2)
    shifts = [window_shift(some, 5, step) for step in range(400)]
    assert shifts == [window_shift(some, 5, step) for step in range(400)]
    assert shifts != [window_shift(some, 6, step) for step in range(400)]
    counts = [shifts.count((row, column)) for row in (0, 1) for column in (0, 1)]
    assert sum(counts) == 400 and min(counts) > 60
    assert window_shift(RefineConfig(), 5, 3) == (0, 0)
    assert max(window_shift(some, -1, 0)) < 2  # any seed


def test_the_box_is_a_crop_of_the_whole(start, clip):
    view = look(start, clip[3], care=torch.rand(64, 64).round())
    near = view.cut(5)
    wall = torch.tensor([0.9, 0.1, 0.4])
    y, x = [a - b for a, b in zip(view.corner, near.corner)]
    place = np.s_[y : y + near.height, x : x + near.width]
    assert near.height < 64 or near.width < 64
    assert torch.equal(near.on(wall), view.on(wall)[place])
    assert torch.equal(near.care, view.care[place])
    assert torch.equal(near._on(wall), view._on(wall)[place])
    assert near.whole is view and near.bytes() == view.bytes()
    assert near.share == near.height * near.width / 64**2


def test_a_margin_that_reaches_the_edges_changes_nothing(start, clip):
    whole, log = refine(start, clip, 6, config=CONFIG)
    boxed, boxed_log = refine(start, clip, 6, config=replace(CONFIG, margin=64))
    assert same(whole, boxed)
    assert [line['loss'] for line in log] == [line['loss'] for line in boxed_log]


def test_a_box_costs_as_its_picture_does(start, clip):
    "The wall around the box is right in both; at the box's edge SSIM's windows differ a little."
    shots = []
    for margin in (None, 8):
        run = Refinement(start, clip, replace(CONFIG, margin=margin), 8)
        run.step_number = 6
        run.step()
        shots.append((float(run.cost), run.log_line(0.0)['psnr'], run.delta['sh0'].grad))
    (cost, psnr, pull), (boxed_cost, boxed_psnr, boxed_pull) = shots
    assert boxed_cost == pytest.approx(cost, rel=0.02)
    assert boxed_psnr == pytest.approx(psnr, abs=0.1)
    assert (pull - boxed_pull).norm() < 0.1 * pull.norm()


def test_a_view_without_a_person(start, clip):
    empty = replace(clip[1], mask=torch.zeros_like(clip[1].mask))
    frames = Clip([clip[0], empty, clip[2]])
    run = Refinement(start, frames, FAST, 8)
    assert run.view(1).whole is None and run.view(1).share == 1
    assert run.view(0).whole is not None
    result, log = run.go()
    assert not same(result, start) and math.isfinite(log[-1]['psnr'])


def test_extra_views_are_cut_too(start, clip):
    care = torch.ones(64, 64)
    run = Refinement(start, clip, FAST, 8, extra=[look(start, clip[0], care)])
    assert run.extra[0].care.shape == run.extra[0].on(torch.ones(3)).shape[:2]
    run.go()


def test_the_fast_presets():
    fast, quick, ours = fast_config(), quick_config(), RefineConfig()
    assert (fast.iters, quick.iters) == (5_000, 2_500)
    assert quick_config(iters=3).iters == 3 and fast_config(keep=0.0).keep == 0
    factors = {k: fast.lr[k] / ours.lr[k] for k in RAW}
    assert factors == pytest.approx(dict.fromkeys(RAW, 1.5) | dict.fromkeys(RAW[:3], 3.0))
    paper = paper_config()
    assert (paper.huber, paper.windows, paper.margin, paper.beta2) == (0, 1, None, 0.999)
    run = Refinement.__new__(Refinement)
    run.cfg = fast
    run.delta = {k: torch.zeros(1, requires_grad=True) for k in RAW}
    run._set_up_optimiser()
    assert run.opt.defaults['betas'] == (0.9, 0.99)


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(bounds=(-4.0, 0.5), freeze=0),
        dict(matte_behind=True),
        dict(bounded_colours=True, lr=dict(paper_config().lr, sh0=1.0)),
    ],
)
def test_the_papers_options_are_the_readable_ones(start, clip, changes):
    "Fast or readable, the same steps, whatever is as printed."
    config = paper_config(iters=8, aspect_from=2, **{'freeze': 3, **changes})
    fast, _ = refine(start, clip, config=config, seed=1)
    plain = refine_readable(start, clip, 8, config, seed=1)
    for name in RAW:
        moved = (plain.splats[name] - start.splats[name]).abs().mean()
        assert (plain.splats[name] - fast.splats[name]).abs().mean() < 0.1 * moved, name


def test_what_is_printed(start, clip):
    "Colours leave the range of white, scales keep the absolute one; b cancels in Eq. 13."
    rates = dict(paper_config().lr, sh0=2.0, log_scales=2.0)
    wild = paper_config(iters=6, freeze=0, bounds=(-3.0, 0.0), lr=rates)
    splats = refine(start, clip, config=wild)[0].splats
    assert splats['sh0'].abs().max() > 2.0
    assert splats['log_scales'].min() >= -3 - 1e-4 and splats['log_scales'].max() <= 1e-4
    run = Refinement(start, clip, paper_config(matte_behind=True, dssim=0.0), 10)
    losses = [run.loss(run.view(0), torch.full((3,), b)).loss.item() for b in (0.0, 0.5, 1.0)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


def test_reference_frame(clip):
    with pytest.raises(InputError, match='clip is empty'):
        reference_frame(Clip([]))
    open_mouths = [
        replace(frame, params=dict(frame.params, jaw=torch.full((1, 3), 0.1 + 0.01 * i)))
        for i, frame in enumerate(clip)
    ]
    assert reference_frame(Clip(open_mouths[::-1])) == len(clip) - 1


def test_presets_by_name():
    "The command's names, those of the table, and what each makes."
    from spatialavatar0.cli import Refining
    from spatialavatar0.pipeline import RefineOptions

    assert list(Refining) == list(REFINE_PRESETS)
    assert RefineOptions().config() == fast_config()
    assert RefineOptions('paper').config() == paper_config()
    assert RefineOptions('ours', 7).config() == RefineConfig(iters=7)
    with pytest.raises(InputError, match="one of fast, quick, ours, paper; got 'best'"):
        RefineOptions('best').config()


def test_cheaper_steps_go_on_to_the_last_bit(start, clip, tmp_path):
    whole, _ = refine(start, clip, 12, config=FAST, seed=2)
    run = Refinement(start, clip, FAST, 12, seed=2)
    for _ in range(7):
        run.step()
    run.save(tmp_path / 's.safetensors')
    resumed, _ = refine(start, clip, 12, config=FAST, seed=2, state=tmp_path / 's.safetensors')
    assert same(whole, resumed)


def test_fewer_windows_see_the_same_pictures(start, clip):
    drawn = []
    for windows in (1, 2):
        run = Refinement(start, clip, replace(CONFIG, windows=windows), 12)
        draws = []
        for _ in range(4):
            run.step()
            draws.append(run.pair[1].sum().item())
        drawn.append(draws)
    assert drawn[0] == drawn[1]


def test_a_state_from_before_the_options_goes_on(start, clip, tmp_path):
    "Options that came later are not named where they change nothing."
    state = tmp_path / 's.safetensors'
    run = Refinement(start, clip, CONFIG, 4)
    assert not set(run.identity()['options']) & {'huber', 'windows', 'margin', 'beta2'}
    run.step()
    run.save(state)
    refine(start, clip, 4, config=CONFIG, state=state)
    run.save(state)
    for name, value in dict(huber=0.05, windows=2, margin=16, beta2=0.99).items():
        with pytest.raises(InputError, match=f'other work: {name}'):
            refine(start, clip, 4, config=replace(CONFIG, **{name: value}), state=state)


THREADS = """
import numba as nb, torch
from spatialavatar0.pictures.fast_metrics import photo_terms
from spatialavatar0.stage2.loop import fast_keep_loss

def slopes(loss, x):
    value = loss(x)
    return [value.detach(), *torch.autograd.grad(value, x)]

dice = torch.Generator().manual_seed(0)
rgb = torch.rand(83, 70, 3, generator=dice).requires_grad_()
target = torch.rand(83, 70, 3, generator=dice)
change = torch.randn(5000, 3, generator=dice).requires_grad_()
near = torch.randint(-1, 5000, (5000, 4), generator=dice).int()
tie = torch.rand(5000, generator=dice)
found = []
for threads in (1, 2):
    nb.set_num_threads(threads)
    found.append([])
    for options in (dict(), dict(huber=0.05), dict(windows=(2, 1, 0), share=0.5)):
        found[-1] += slopes(lambda x: photo_terms(x, target, **options), rgb)
    found[-1] += slopes(lambda x: fast_keep_loss(x, near, tie), change)
assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
print(len(found[0]))
"""


def test_one_thread_or_two_the_same_bits():
    env = dict(os.environ, NUMBA_NUM_THREADS='2', OMP_NUM_THREADS='1')
    made = subprocess.run(
        [sys.executable, '-c', THREADS], env=env, text=True, check=True, capture_output=True
    )
    assert made.stdout.split() == ['8']


def test_no_number_is_lost():
    "nan in a picture is nan in the loss, in whichever row and class of columns."
    for windows in ((1, 0, 0), (2, 1, 0)):
        for y, x in ((0, 0), (17, 30), (36, 51)):
            from spatialavatar0.pictures.fast_metrics import photo_terms

            rgb, target = two_pictures()
            rgb[y, x, 1] = math.nan
            assert math.isnan(photo_terms(rgb, target, windows=windows))


def test_two_losses_at_once_keep_their_gradients():
    rgb, target = two_pictures()
    one, other = [x.requires_grad_() for x in (rgb.clone(), rgb.clamp(0.2, 0.8))]
    losses = [fast_photo_loss(x, target, RefineConfig()) for x in (one, other)]
    (3 * losses[0] + losses[1]).backward()
    for x, weight in ((one, 3), (other, 1)):
        alone = with_slope(fast_photo_loss, x.detach(), target, RefineConfig())[1]
        assert torch.allclose(x.grad.double(), weight * alone, rtol=1e-5)
