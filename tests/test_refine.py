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
from spatialavatar0.stage2.loop import NotFinite, Refinement, measure, refine
from spatialavatar0.stage2.refine import (
    RAW,
    RefineConfig,
    clamp_scales,
    keep_loss,
    light_share,
    paper_config,
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


def same(a, b):
    return all(torch.equal(a.splats[k], b.splats[k]) for k in RAW)


def test_layout_stays_and_seeds_decide(start, clip):
    a, log = refine(start, clip, 12, config=CONFIG, seed=3)
    b, _ = refine(start, clip, 12, config=CONFIG, seed=3)
    c, _ = refine(start, clip, 12, config=CONFIG, seed=4)
    assert same(a, b)
    assert not same(a, c)
    assert len(a) == len(start)
    for k in ('face_ids', 'bary', 'texels'):
        assert torch.equal(getattr(a.binding, k), getattr(start.binding, k))
    assert not same(a, start)
    assert [r['step'] for r in log] == [0, 11]
    assert measure(a, clip)['psnr'] > measure(start, clip)['psnr']


def test_an_avatar_behind_the_camera_is_named(start, clip):
    away = replace(clip[3], viewmat=torch.diag(torch.tensor([-1.0, 1, -1, 1])) @ clip[3].viewmat)
    with pytest.raises(InputError, match='frame 3 shows none of the'):
        measure(start, Clip([clip[2], away]))


def test_scales_stand_still_then_move_within_bounds(start, clip):
    run = Refinement(
        start, clip, replace(CONFIG, spread=0.7, grow=0.2, lr=dict(CONFIG.lr, log_scales=0.5)), 12
    )
    for i in range(4):
        run.step()
        assert torch.equal(run.splats()['log_scales'], start.splats['log_scales'])
    for i in range(8):
        run.step()
        s = run.splats()['log_scales']
        assert (s.amax(-1) - s.amin(-1)).max() <= 1.4 + 1e-4
    assert not torch.equal(s, start.splats['log_scales'])


def test_clamp_bounds_the_ratio():
    g = torch.Generator().manual_seed(0)
    s = torch.randn(500, 3, generator=g)
    x = clamp_scales(5 * torch.randn(500, 3, generator=g), s, 1.0, 2.0)
    assert (x.amax(-1) - x.amin(-1)).max() <= 2 + 1e-5  # whatever came in: no ratio above e^2
    inside = (x - x.mean(-1, keepdim=True)).abs().amax(
        -1
    ) <= 1  # clipping moves the mean: only what needed none stays
    assert torch.allclose(clamp_scales(x, x, 1.0, 2.0)[inside], x[inside], atol=1e-5)


RUN = """
import sys, time
from spatialavatar0.avatar.avatar import load_avatar
from spatialavatar0.pictures.clips import Clip
from spatialavatar0.stage2.loop import Refinement, calm
from spatialavatar0.stage2.refine import RefineConfig
from spatialavatar0.pictures.people import make_person, mono_clip
start, state, stop, out = sys.argv[1:]
run = Refinement(load_avatar(start), Clip(mono_clip(make_person(2), 12, 64, seed=1).frames), RefineConfig(freeze=4, aspect_from=4), 16, seed=5)
try: run.load(state)
except ValueError: pass
with calm(64*64):
    while run.step_number<16:
        if run.step_number%3==0: run.save(state); print(run.step_number, flush=True)
        if run.step_number==int(stop): time.sleep(60)
        run.step()
run.result().save(out)
"""


def test_killed_and_resumed(start, tmp_path):
    """kill -9 in the middle of a run; the same call goes on and ends where an undisturbed one does,
    to the last bit."""
    start.save(tmp_path / 'start.safetensors')
    env = dict(os.environ, NUMBA_NUM_THREADS='1', OMP_NUM_THREADS='1')

    def command(state, stop, out):
        return [
            sys.executable,
            '-c',
            RUN,
            *map(str, (tmp_path / 'start.safetensors', tmp_path / state, stop, tmp_path / out)),
        ]

    p = subprocess.Popen(command('killed', 10, 'none'), stdout=subprocess.PIPE, text=True, env=env)
    assert any(line.strip() == '9' for line in p.stdout)
    p.send_signal(signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL
    assert not (tmp_path / 'none').exists()
    said = subprocess.run(
        command('killed', -1, 'resumed'), env=env, check=True, capture_output=True, text=True
    ).stdout
    assert said.split() == ['9', '12', '15']
    subprocess.run(
        command('whole', -1, 'whole.safetensors'), env=env, check=True, capture_output=True
    )
    assert (tmp_path / 'resumed').read_bytes() == (tmp_path / 'whole.safetensors').read_bytes()


def test_state_of_another_run_is_refused(start, clip, tmp_path):
    state = tmp_path / 's.safetensors'
    refine(start, clip, 2, config=CONFIG, state=state)
    for kw, word in ((dict(seed=1), 'seed'), (dict(config=paper_config()), 'config')):
        with pytest.raises(InputError, match=f'another run: .*{word}'):
            refine(start, clip, 2, **{**dict(config=CONFIG, state=state), **kw})
    with pytest.raises(InputError, match='iters'):
        refine(start, clip, 3, config=CONFIG, state=state)
    state.write_bytes(b'not a state')
    with pytest.raises(InputError, match='not the state of a refinement'):
        refine(start, clip, 2, config=CONFIG, state=state)


def test_interrupt_keeps_what_is_there(start, clip, tmp_path, capsys):
    def stop(step, avatar):
        raise KeyboardInterrupt

    a, log = refine(start, clip, 12, config=CONFIG, callback=stop, state=tmp_path / 's.safetensors')
    assert not same(a, start)
    assert len(log) == 1
    assert 'stopped after 1 of 12 steps' in capsys.readouterr().out
    b, _ = refine(start, clip, 12, config=CONFIG, state=tmp_path / 's.safetensors')
    c, _ = refine(start, clip, 12, config=CONFIG)
    assert same(b, c)


def test_nan_is_named_and_harms_nothing(start, clip, tmp_path):
    run = Refinement(start, clip, CONFIG, 12)
    run.step()
    before = {k: v.clone() for k, v in run.splats().items()}
    run.delta['quats'].data[7] = torch.nan
    with pytest.raises(InputError, match='quats'):
        run.step()  # the rasterizer names it
    run = Refinement(start, clip, replace(CONFIG, l1=math.nan), 12)
    with pytest.raises(NotFinite, match='loss.* at step 0, frame'):
        run.step()
    assert all(torch.equal(v, start.splats[k]) for k, v in run.splats().items())
    with pytest.raises(NotFinite):
        refine(
            start, clip, 5, config=replace(CONFIG, l1=math.nan), state=tmp_path / 's.safetensors'
        )
    assert (tmp_path / 's.safetensors').exists()


def test_pictures_may_not_fit(start, clip):
    "Without room to keep pictures they are made again: the same result."
    a, _ = refine(start, clip, 8, config=CONFIG)
    run = Refinement(start, clip, CONFIG, 8)
    run.room = 0
    b, _ = run.go()
    assert same(a, b) and not run.views


def test_light_is_what_the_pictures_take(start, clip):
    share = light_share(start, clip)
    assert share.min() >= 0
    assert abs(float(share.mean()) - 1) < 1e-4
    assert float((share < 0.01).float().mean()) > 0.1


def test_neighbours(start):
    near = texel_neighbours(start.binding)
    t = start.binding.texels
    for k, (dr, dc) in enumerate(((0, 1), (0, -1), (1, 0), (-1, 0))):
        i = (near[:, k] >= 0).nonzero()[:, 0]
        assert torch.equal(t[near[i, k].long()], t[i] + torch.tensor([dr, dc]))
    x = torch.randn(len(start), 2).requires_grad_()
    s = torch.rand(len(start))
    keep_loss(x, near, s).backward()
    with torch.no_grad():
        numeric = [
            (float(keep_loss(x + e, near, s)) - float(keep_loss(x - e, near, s))) / 0.2
            for e in (
                0.1 * torch.nn.functional.one_hot(torch.tensor(k), x.numel()).reshape(x.shape)
                for k in (0, 7, 31)
            )
        ]
    assert torch.allclose(x.grad.reshape(-1)[[0, 7, 31]], torch.tensor(numeric), atol=1e-4)


@pytest.mark.parametrize('dtype', (torch.float32, torch.float64))
def test_aspect_of_a_known_disc(dtype):
    "A disc of radii 3:1 seen from the front, and edge-on."
    view = look_at((0, 0, 2.0), (0, 0, 0)).to(dtype)
    K = intrinsics(200.0, 64, 64).to(dtype)

    def x(*v):
        return torch.tensor([v], dtype=dtype)

    assert (
        abs(
            float(
                fast_log_aspects(x(0, 0, 0), x(1, 0, 0, 0), x(0.03, 0.01, 0.001), view, K, 64, 64)
            )
            - math.log(3)
        )
        < 1e-3
    )
    assert (
        float(fast_log_aspects(x(0, 0, 5.0), x(1, 0, 0, 0), x(0.03, 0.01, 0.001), view, K, 64, 64))
        == -1
    )
    half = math.sqrt(0.5)
    edge = float(
        fast_log_aspects(x(0, 0, 0), x(half, 0, half, 0), x(0.03, 0.01, 0.001), view, K, 64, 64)
    )  # turned about y: 1 mm by 10 mm
    assert abs(edge - math.log(10)) < 0.02


def test_start_frame(clip):
    f = clip[0]

    def turned(jaw, yaw):
        return replace(
            f,
            params=dict(
                f.params,
                jaw=torch.tensor([[jaw, 0.0, 0]]),
                rotation=torch.tensor([[0.0, yaw, 0]]),
                neck=torch.zeros(1, 3),
            ),
        )

    many = Clip([turned(0.3, 0.0), turned(0.0, 0.5), turned(0.0, 0.1), *[turned(0.2, 0.0)] * 20])
    assert start_frame(many) == 2
    with pytest.raises(InputError, match='empty'):
        start_frame(Clip([]))


def test_a_flame_head(tmp_path, clip):
    "Stage 2 on a FLAME-format head that has neither regions nor an ARKit map."
    h = open_head()
    from spatialavatar0.head.flame_files import write_flame_folder

    write_flame_folder(h, tmp_path / 'open')
    flame = load_flame(tmp_path / 'open')
    frames = Clip(
        [
            replace(
                f,
                params={
                    k: v
                    for k, v in f.params.items()
                    if k in ('jaw', 'neck', 'rotation', 'eyes', 'translation')
                },
            )
            for f in clip[:4]
        ]
    )
    a, _ = refine(new_avatar(flame, 24), frames, 8, config=CONFIG)
    assert measure(a, frames)['psnr'] > measure(new_avatar(flame, 24), frames)['psnr']
    assert a.head is flame


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
    person = make_person(2)
    f = replace(clip[0], params=dict(clip[0].params, static_offset=person.static_offset[None]))
    a, bald = from_frame(f, 24), from_frame(clip[0], 24)
    assert torch.equal(
        from_frame(
            replace(f, params=dict(f.params, static_offset=0 * person.static_offset[None])), 24
        ).static_offset,
        bald.static_offset,
    )

    def off(x):
        return (x.static_offset - person.static_offset).norm(dim=-1)

    assert off(a).max() < 0.015
    assert off(a).mean() < 0.5 * off(bald).mean()


def blob(folder, V):
    "A FLAME-format head that is not a head: random vertices, an atlas, no regions."
    F = 2 * V - 20
    ff.write_original(folder / 'generic_model.pkl', ff.model(V, F))
    side = int(np.ceil(F**0.5))
    at = np.stack([np.arange(F) % side, np.arange(F) // side], -1)
    np.savez(
        folder / 'uv.npz',
        vt=((at[:, None] + [[0.1, 0.1], [0.9, 0.1], [0.1, 0.9]]) / side).reshape(-1, 2),
        ft=np.arange(3 * F).reshape(F, 3),
    )
    return load_flame(folder)


@pytest.mark.parametrize('V,offset', ((60, False), (84, True)))
def test_the_command_on_a_flame_head(tmp_path, V, offset):
    """A VHAP folder tracked with another head: `spatialavatar0 refine new CLIP --head MODEL`, and
    its avatar opens on that head."""
    from spatialavatar0 import cli
    from spatialavatar0.avatar.avatar import load_avatar
    from spatialavatar0.pictures.clips import Frame, write_vhap

    (tmp_path / 'model').mkdir()
    head = blob(tmp_path / 'model', V)
    g = torch.Generator().manual_seed(V)
    K = intrinsics(70.0, 48, 48)
    params = dict(
        shape=torch.randn(1, head.num_shape, generator=g),
        static_offset=0.005 * torch.randn(1, V, 3, generator=g) * offset,
    )
    truth = new_avatar(head, 32, params['shape'], params['static_offset'][0])
    truth.splats['sh0'] = torch.randn(len(truth), 3, generator=g)

    def frame(t):
        p = dict(
            expr=torch.zeros(1, head.num_expr),
            jaw=torch.tensor([[0.02 * t, 0, 0]]),
            **{
                k: torch.zeros(1, n)
                for k, n in dict(rotation=3, neck=3, eyes=6, translation=3).items()
            },
        )
        view = look_at((0.3 * math.sin(0.6 * t), 0.05, 0.9), (0, 0, 0))
        rgb, alpha = truth.render(view, K, 48, 48, background=0.0, **p)
        return Frame(rgb.clamp(0, 1), alpha.clamp(0, 1), view, K, dict(p, **params), t)

    write_vhap([frame(t) for t in range(10)], tmp_path / 'clip', head)
    args = [
        'refine',
        'new',
        str(tmp_path / 'clip'),
        '--out',
        str(tmp_path / 'out'),
        '--iters',
        '30',
        '--resolution',
        '24',
    ]
    assert cli.main([*args, '--head', str(tmp_path / 'model')]) == 0
    a = load_avatar(tmp_path / 'out' / 'avatar.safetensors', head)
    numbers = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert torch.allclose(a.static_offset, params['static_offset'][0], atol=1e-6)
    assert numbers['steps'] == 30
    assert numbers['refined']['psnr'] > numbers['start']['psnr'] + 1
    with pytest.raises(InputError, match='another head'):
        load_avatar(tmp_path / 'out' / 'avatar.safetensors')
    assert cli.main(args) == 1  # the folder says which head it was tracked with
