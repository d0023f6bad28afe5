"""Stage 1's training: every loss against a case done by hand, the sampler's statistics, the draws,
resume after kill -9, several processes, what stops it."""

import itertools
import math
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import intrinsics
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.clips import Clip
from spatialavatar0.pictures.domains import Trial, mono, multi, people
from spatialavatar0.pictures.metrics import blur_matrix, ms_ssim, open_lpips
from spatialavatar0.stage1.backbone import layer_scales
from spatialavatar0.stage1.generator import from_preset
from spatialavatar0.stage1.objective import (
    Weights,
    box_l1,
    face_box,
    l2_sp,
    pull_home,
    signs,
    texel_pairs,
    uv_tv,
    view_jacobian,
)
from spatialavatar0.stage1.schedule import (
    LAPTOP,
    MonoPhase,
    MultiPhase,
    Roll,
    choose,
    dissimilarity,
    draw_mono,
    draw_multi,
    laptop_schedule,
    paper_schedule,
    source_chances,
    temperature,
)
from spatialavatar0.stage1.trainer import BadBatch, Shelf, Trainer, evaluate, looked

FULL = replace(LAPTOP, face=1.0, jacobian=0.1, ms_ssim=0.5)
HEAD = open_head()


def network(seed=0):
    return from_preset('tiny', HEAD, seed)


def schedule(mono_steps=4, multi_steps=3, **changes):
    return laptop_schedule(mono_steps, multi_steps, 2, **changes)


@pytest.fixture(scope='module')
def data():
    g = network()
    return [
        Shelf(people(mono(64, instants=6), 3), g),
        Shelf(people(multi(64, instants=5, cameras=5), 2), g),
    ]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.params, b.params))


# ---- losses


def test_ms_ssim_of_flat_pictures_is_the_brightness_term():
    a, b = (
        torch.full((2, 24, 24, 3), 0.6),
        torch.full((2, 24, 24, 3), 0.3),
    )  # no structure: every structure term is 1
    assert torch.allclose(
        ms_ssim(a, b), torch.full((2,), (2 * 0.6 * 0.3 + 1e-4) / (0.36 + 0.09 + 1e-4)), atol=2e-3
    )
    assert torch.allclose(ms_ssim(a, a), torch.ones(2), atol=1e-5)


def test_ms_ssim_of_one_scale_by_hand():
    a, b = torch.rand(2, 1, 9, 9, 3, generator=rng())
    w = blur_matrix(9, 2.0).float()
    assert torch.allclose(w.sum(1), torch.ones(9))

    def mean(x):
        return sum(
            w[4, i] * w[4, j] * x[0, i, j, 0] for i in range(9) for j in range(9)
        )  # the window around the middle pixel, by loops

    ma, mb = mean(a), mean(b)
    va = mean(a * a) - ma * ma
    vb = mean(b * b) - mb * mb
    cov = mean(a * b) - ma * mb
    middle = (2 * ma * mb + 1e-4) / (ma * ma + mb * mb + 1e-4) * (2 * cov + 9e-4) / (va + vb + 9e-4)
    x = torch.stack([a, b, a * a, b * b, a * b])[:, 0, ..., 0]
    m = w @ x @ w.T
    full = (
        (2 * m[0] * m[1] + 1e-4)
        / (m[0] ** 2 + m[1] ** 2 + 1e-4)
        * (2 * (m[4] - m[0] * m[1]) + 9e-4)
        / (m[2] - m[0] ** 2 + m[3] - m[1] ** 2 + 9e-4)
    )
    assert torch.allclose(full[4, 4], middle, atol=1e-4)
    assert torch.allclose(ms_ssim(a[..., :1], b[..., :1], (2.0,)), full.mean()[None], atol=1e-5)


def test_ms_ssim_sees_what_one_window_does_not():
    a = 0.5 * torch.ones(1, 48, 48, 3)
    a[:, :, 24:] = 0.6
    b = a.flip(2)  # a wide step the wrong way round
    assert ms_ssim(a, b) < ms_ssim(a, b, (0.5,)) < 1


def test_face_box_is_dilated_and_cut():
    K, view = intrinsics(100.0, 100, 100), torch.eye(4)
    p = torch.tensor([[-0.1, -0.2, 1.0], [0.1, 0.2, 1.0]])  # pixels 40..60 by 30..70
    assert face_box(p, view, K, 100, 100, 1.0) == (40, 30, 60, 70)
    assert face_box(p, view, K, 100, 100) == (34, 17, 66, 83)
    assert face_box(p * torch.tensor([9.0, 9.0, 1.0]), view, K, 100, 100) == (0, 0, 100, 100)
    x0, y0, x1, y1 = face_box(p + torch.tensor([9.0, 9.0, 0]), view, K, 100, 100)
    assert x1 > x0 and y1 > y0  # out of the picture: still a pixel


def test_box_l1_counts_the_box_alone():
    a = torch.zeros(10, 10, 3)
    b = torch.zeros(10, 10, 3)
    b[2:4, 5:9] = 0.5
    b[9, 9] = 1
    assert float(box_l1(a, b, (5, 2, 9, 4))) == 0.5
    assert float(box_l1(a, b, (5, 2, 9, 6))) == 0.25


def test_uv_tv_by_hand_and_gaps_do_not_count():
    b = network().binding
    across, down = texel_pairs(b)
    r, c = b.texels.T.float()
    assert torch.allclose(
        uv_tv(torch.stack([3 * c - 2 * r], -1)[None], (across, down)), torch.tensor(5.0)
    )  # 3 a step across, 2 down
    for p, d in ((across, (0, 1)), (down, (1, 0))):
        assert ((b.texels[p[:, 1]] - b.texels[p[:, 0]]) == torch.tensor(d)).all()


def test_view_jacobian_averages_to_the_frobenius_norm():
    A, B = torch.randn(2, 4, 5, generator=rng())
    gamma = torch.randn(1, 5, generator=rng(1)).requires_grad_()
    total = 0.0
    for v in itertools.product((-1.0, 1.0), repeat=4):  # all sign vectors: the mean is exact
        v = torch.tensor(v)[None]
        total += view_jacobian((gamma @ A.T, gamma @ B.T), gamma, (v, v)).expm1()
    assert torch.allclose(total / 16, (A.square().sum() + B.square().sum())[None], rtol=1e-5)


def test_view_jacobian_can_be_trained():
    W = torch.randn(3, 2, generator=rng()).requires_grad_()
    gamma = torch.randn(1, 2, generator=rng(1)).requires_grad_()
    v = signs((1, 3), rng(2))
    view_jacobian((torch.tanh(gamma @ W.T),), gamma, (v,)).sum().backward()

    def f(W):
        return view_jacobian((torch.tanh(gamma @ W.T),), gamma, (v,)).sum()

    e = torch.zeros(3, 2)
    e[1, 0] = 1e-3
    assert W.grad.any()
    assert abs(float((f(W + e) - f(W - e)).detach()) / 2e-3 - float(W.grad[1, 0])) < 1e-3


def test_l2_sp_is_a_sum_and_its_gradient_is_twice_the_way():
    home = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    params = [torch.tensor([1.5, 2.0]).requires_grad_(), torch.tensor([[1.0]]).requires_grad_()]
    assert float(l2_sp(params, home)) == 0.25 + 4.0
    for p in params:
        p.grad = torch.ones_like(p)
    pull_home(params, home, 0.1)
    assert torch.allclose(params[0].grad, torch.tensor([1.1, 1.0]))
    assert torch.allclose(params[1].grad, torch.tensor([[1 - 0.4]]))


def test_terms_of_a_batch_are_what_they_say(data):
    t = Trainer(network(), schedule(), data)
    batch = t.draw()
    w = replace(FULL, residual=1e-2)
    batch.probes = [signs((2, len(t.generator.binding), 3), rng(k)) for k in (1, 2)]
    with torch.no_grad():
        t.generator.residual.out['color'].bias.fill_(0.2)
    rgb, truth, d, _ = t.render(batch, w)
    terms, each = t.terms(batch, w)

    def near(a, b):
        return abs(float(a.detach()) - float(b.detach() if hasattr(b, 'detach') else b)) < 1e-5

    assert near(terms['l1'], (rgb - truth).abs().mean())
    assert each.shape == (2,)
    assert near(terms['ms_ssim'], 1 - ms_ssim(rgb, truth).mean())
    assert near(terms['residual'], 0.2 / 4)
    assert near(terms['offset'], d.maps['position'].square().mean())
    assert terms['jacobian'] > 0
    assert terms['face'] > 0
    assert set(terms) == {'l1', 'ssim', 'ms_ssim', 'face', 'tv', 'jacobian', 'residual', 'offset'}


def test_lpips_is_real_or_left_out(monkeypatch, data, capsys):
    import spatialavatar0.ground.assets as m

    monkeypatch.setattr(m, 'find_local', lambda a: None)
    assert open_lpips() is None
    t = Trainer(network(), schedule(weights=replace(LAPTOP, lpips=1.0)), data)
    assert 'LPIPS' in capsys.readouterr().out
    assert 'lpips' not in t.step()


# ---- who is shown


def roll(times=6, cameras=5):
    g = rng(3)
    n = times * cameras
    d = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=-1)
    return Roll(
        d,
        torch.randn(n, 5, generator=g),
        [i // cameras for i in range(n)],
        [f'{i % cameras:02d}' for i in range(n)],
        'person 7',
    )


def test_dissimilarity_counts_both_parts_alike():
    r = roll()
    d = dissimilarity(r.directions, r.exprs, 2)
    others = torch.arange(len(r)) != 2
    assert abs(float(d[others].mean()) - 2) < 1e-5
    assert float(d[2]) < 1e-2
    assert torch.allclose(
        d, dissimilarity(r.directions, 100 * r.exprs, 2), atol=1e-4
    )  # no unit matters
    assert (
        abs(float(dissimilarity(r.directions, 0 * r.exprs, 2)[others].mean()) - 1) < 1e-5
    )  # one expression: the angle decides


def test_temperature_and_softmax_by_hand():
    assert [temperature(t, 1000) for t in (0, 125, 250, 999)] == [2.0, 1.25, 0.5, 0.5]
    p = source_chances(torch.tensor([1.0, 2.0]), 0.5)
    assert abs(float(p[1] / p[0]) - math.exp(2)) < 1e-4


def test_drawn_as_often_as_the_softmax_says():
    r = roll(2, 3)
    places = torch.arange(6)
    g = rng(5)
    counts = torch.zeros(6, 6)
    n = 3000
    for _ in range(n):
        s, t = choose(r, places, 2, 0.5, g)
        counts[t, s[0]] += 1
        assert t not in s and len(set(s)) == 2
    assert (counts.sum(1) / n - 1 / 6).abs().max() < 0.02
    for t in range(6):
        p = source_chances(dissimilarity(r.directions, r.exprs, t), 0.5)
        p[t] = 0
        p /= p.sum()
        assert (counts[t] / counts[t].sum() - p).abs().max() < 4 * math.sqrt(0.25 / (n / 6))


def test_colder_prefers_the_different():
    r = roll()

    def mean(T):
        return (
            sum(
                float(dissimilarity(r.directions, r.exprs, t)[s[0]])
                for g in [rng(1)]
                for _ in range(200)
                for s, t in [choose(r, torch.arange(len(r)), 1, T, g)]
            )
            / 200
        )

    assert mean(0.25) > mean(0.5) > mean(2.0) + 0.1


def test_phase_2_draws():
    r = roll()
    g = rng(2)
    crossed = 0
    n = 1200
    for i in range(n):
        K = 1 + i % 4
        if K == 4:
            K = 3  # four cameras: three sources
        s, t = draw_multi(r, K, 1.0, g)
        times = {r.times[j] for j in (*s, t)}
        cameras = {r.cameras[j] for j in (*s, t)}
        assert len(s) == K and len({*s, t}) == K + 1
        if len(times) == 1:
            assert len(cameras) == K + 1
        else:
            crossed += 1
            assert len(times) == K + 1 and (K > 1 or len(cameras) == 1)
    assert abs(crossed / n - 0.25) < 0.05
    assert all(
        len({r.times[j] for j in (*s, t)}) == 1
        for s, t in (draw_multi(r, 2, 1.0, g, cross_time=0.0) for _ in range(50))
    )
    assert all(
        len({r.times[j] for j in (*s, t)}) == 3
        for s, t in (draw_multi(r, 2, 1.0, g, cross_time=1.0) for _ in range(50))
    )


def test_what_cannot_be_drawn():
    r = roll()
    g = rng()
    with pytest.raises(InputError, match='K should be at least 1'):
        draw_mono(r, 0, 1.0, g)
    with pytest.raises(InputError, match='person 7: 30 sources and a target need 31'):
        draw_mono(r, 30, 1.0, g)
    with pytest.raises(InputError, match='cross-time with 6 sources needs 7 instants; there are 6'):
        draw_multi(r, 6, 1.0, g, cross_time=1.0)
    gone = Roll(r.directions[:-1], r.exprs[:-1], r.times[:-1], r.cameras[:-1], 'person 7')
    with pytest.raises(InputError, match="camera '04' is missing at instant 5"):
        draw_multi(gone, 1, 1.0, g)


# ---- the schedule


def test_papers_numbers():
    a, b = paper_schedule()
    assert (a.steps, a.batch, a.clip, a.weights) == (200_000, 48, 5.0, Weights())
    assert (
        b.batch,
        b.cross_time,
        b.weights.l2sp,
        b.weights.residual,
        b.layer_decay,
        b.bf16,
    ) == (12, 0.25, 1e-3, 1e-2, 0.65, True)
    assert a.rate(0) == 2.5e-4
    assert abs(a.rate(80_000) - 0.55 * 2.5e-4) < 1e-12
    assert all(abs(a.rate(t) - 2.5e-5) < 1e-12 for t in (160_000, 199_999))
    assert b.rate(0) < 1e-6
    assert abs(b.rate(1000) - 1e-4) < 1e-6
    assert b.rate(b.steps - 1) < 1e-9
    assert type(a.optimiser([torch.zeros(1).requires_grad_()])) is torch.optim.Adam
    assert type(b.optimiser([torch.zeros(1).requires_grad_()])) is torch.optim.AdamW


def test_deeper_layers_learn_slower():
    names = [
        'encoder.vit.patch_embed.proj.weight',
        'encoder.vit.blocks.0.w',
        'encoder.vit.blocks.1.w',
        'encoder.head.w',
        'uvnet.down.0.w',
    ]
    assert layer_scales(names, 0.5) == [0.125, 0.25, 0.5, 1.0, 1.0]
    assert layer_scales(names, 1) == [1.0] * 5
    assert layer_scales(
        ['encoder.down.0.0.weight', 'encoder.down.3.0.weight', 'encoder.fine.weight'], 0.5
    ) == [0.0625, 0.5, 1.0]


def test_loss_falls_and_phases_follow(data):
    t = Trainer(network(), [MonoPhase(30, 2, 3e-3, LAPTOP, warmup=3), schedule(4, 4)[1]], data)
    batch = t.draw()

    def cost():
        return sum(
            float(x.detach()) * getattr(LAPTOP, k) for k, x in t.terms(batch, LAPTOP)[0].items()
        )

    first = cost()
    t.run(30, show=False)
    assert cost() < 0.93 * first
    old = t.opt
    before = [p.detach().clone() for p in t.params]
    t.run(show=False)
    assert t.opt is not old
    assert type(t.opt) is torch.optim.AdamW
    assert all(map(torch.equal, t.home, before))
    assert not torch.equal(t.params[0], t.home[0])
    assert [r['phase'] for r in t.log][-1] == 'multi'
    assert t.log[-1]['l2sp'] > 0


def test_a_stronger_spring_keeps_closer(data):
    def way(l):
        t = Trainer(network(), [MultiPhase(6, 2, 1e-3, replace(LAPTOP, l2sp=l))], data[1:])
        t.run(show=False)
        return float(l2_sp(t.params, t.home))

    assert way(10.0) < 0.7 * way(1e-9)


# ---- resume

RUN = """
import sys, torch
from spatialavatar0.pictures.domains import mono, multi, people
from spatialavatar0.stage1.generator import from_preset
from spatialavatar0.stage1.schedule import laptop_schedule
from spatialavatar0.stage1.trainer import Shelf, Trainer
torch.set_num_threads(1); g = from_preset('tiny', seed=0)
data = [Shelf(people(mono(64, instants=6), 3), g), Shelf(people(multi(64, instants=5, cameras=5), 2), g)]
t = Trainer(g, laptop_schedule(4, 3, 2), data, 3)
def tell(t): t.save(sys.argv[1]); print(t.step_number, flush=True); sys.argv[2]=='wait' and t.step_number==5 and input()
t.run(callback=tell, show=False)
"""


def test_killed_and_resumed(data, tmp_path):
    "kill -9 in Phase 2; a new process goes on and ends with the weights of an undisturbed run."
    env = dict(os.environ, OMP_NUM_THREADS='1', NUMBA_NUM_THREADS='1')
    state = tmp_path / 'state.safetensors'
    p = subprocess.Popen(
        [sys.executable, '-c', RUN, str(state), 'wait'],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env=env,
    )
    for line in p.stdout:
        if line.strip() == '5':
            break
    p.send_signal(signal.SIGKILL)
    p.wait()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = Trainer(network(), schedule(), data, 3)
        a.load(state)
        assert a.step_number == 5 and a.phase_number == 1
        a.run(show=False)
        b = Trainer(network(), schedule(), data, 3)
        b.run(show=False)
    finally:
        torch.set_num_threads(threads)
    assert a.step_number == b.step_number == 7
    for x, y in zip(a.params, b.params):
        assert torch.allclose(x, y, atol=1e-6, rtol=1e-5)  # across processes: to rounding


def test_saved_and_loaded_is_the_same_to_the_last_bit(data, tmp_path):
    a = Trainer(network(), schedule(), data, 3)
    a.run(3, state=tmp_path / 's.safetensors', show=False)
    a.run(show=False)
    b = Trainer(network(9), schedule(), data, 3)
    b.load(tmp_path / 's.safetensors')
    b.run(show=False)
    assert same(a, b)
    assert a.log[-1]['loss'] == b.log[-1]['loss']
    assert not list(tmp_path.glob('.*'))
    c = Trainer(network(), schedule(), data, 4)
    c.run(show=False)
    assert not same(a, c)


def test_ctrl_c_finishes_the_step(data, tmp_path, capsys):
    a = Trainer(network(), schedule(), data, 3)
    state = tmp_path / 's.safetensors'

    def interrupt(t):
        if t.step_number == 2:
            os.kill(os.getpid(), signal.SIGINT)

    a.run(state=state, callback=interrupt, show=False)
    assert a.step_number == 2
    assert 'stopped after 2 of 7' in capsys.readouterr().out
    b = Trainer(network(), schedule(), data, 3)
    b.load(state)
    b.run(show=False)
    c = Trainer(network(), schedule(), data, 3)
    c.run(show=False)
    assert same(b, c)


def test_states_of_others_are_refused(data, tmp_path):
    a = Trainer(network(), schedule(), data)
    a.run(1, show=False)
    path = tmp_path / 's.safetensors'
    a.save(path)
    with pytest.raises(InputError, match='belongs to another run: its seed differ'):
        Trainer(network(), schedule(), data, 1).load(path)
    with pytest.raises(InputError, match='its schedule differ'):
        Trainer(network(), schedule(5), data).load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match='is not the state of a training'):
        a.load(path)
    a.generator.save(path)
    with pytest.raises(InputError, match='is not the state of a training'):
        a.load(path)


# ---- what stops it


def test_nan_names_step_and_frame(data, tmp_path):
    t = Trainer(network(), schedule(), data, 3)
    t.run(1, show=False)
    good = [p.detach().clone() for p in t.params]
    state = tmp_path / 's.safetensors'
    before = t.rng.get_state()
    batch = t.draw()
    t.rng.set_state(before)
    bad = batch.names[0]
    broken = replace(
        batch,
        targets=[
            replace(batch.targets[0], K=float('nan') * batch.targets[0].K),
            *batch.targets[1:],
        ],
    )
    t.draw = lambda: broken
    with pytest.raises(
        BadBatch, match='at step 1: Ks should be finite.*' + bad.split(' (')[0]
    ) as e:
        t.run(state=state, show=False)
    assert str(state) in str(e.value)
    assert all(map(torch.equal, t.params, good))
    u = Trainer(network(), schedule(), data, 3)
    u.load(state)
    u.run(show=False)
    v = Trainer(network(), schedule(), data, 3)
    v.run(show=False)
    assert same(u, v)


def test_a_gradient_alone_may_be_bad(data):
    t = Trainer(network(), schedule(), data)
    t.generator.heads.last['color'].bias.register_hook(lambda g: g * float('inf'))
    before = t.rng.get_state()
    with pytest.raises(BadBatch, match='at step 0: a gradient became nan or inf: person'):
        t.step()
    assert torch.equal(t.rng.get_state(), before)
    assert t.step_number == 0


def test_bad_data():
    g = network()
    clip = Clip(people(mono(64, instants=3), 1)[0].frames)
    nan = Clip([clip[0], replace(clip[1], image=clip[1].image * float('nan')), clip[2]])
    with pytest.raises(InputError, match='person 1, frame 1: .*NaN'):
        Shelf([clip, nan], g)
    with pytest.raises(InputError, match='at least one person'):
        Shelf([], g)
    with pytest.raises(InputError, match='give a folder='):
        Shelf([clip], g, limit=1e4)
    bare = Clip(
        [clip[0], replace(clip[1], params={k: v for k, v in clip[1].params.items() if k != 'jaw'})]
    )
    with pytest.raises(InputError, match='every frame needs the same ones'):
        Shelf([bare], g)
    few = Trainer(g, schedule(), [[clip], [clip]])
    with pytest.raises(
        InputError, match='person 0: . sources and a target need . pictures; there are 3'
    ):
        for _ in range(20):
            few.draw()
    with pytest.raises(InputError, match='one data set per phase, 2; got 1'):
        Trainer(g, schedule(), [[clip]])


def test_a_shelf_in_a_folder(data, tmp_path):
    g = network()
    crowd = people(mono(64, instants=3), 2)
    a = Shelf(crowd, g, tmp_path / 'looks')

    class Untouchable(list):
        pass

    b = Shelf(crowd, g, tmp_path / 'looks')
    x = a.look(1, 2)
    y = b.look(1, 2)
    z = g.look(crowd[1][2])
    for k in ('image', 'uv', 'weight', 'viewmat', 'K'):
        assert torch.equal(getattr(x, k), getattr(z, k))
        assert torch.equal(getattr(y, k), getattr(z, k))
    assert all(torch.equal(y.params[k], z.params[k]) for k in z.params)
    assert b.rolls[1].times == [
        0,
        1,
        2,
    ]
    with pytest.raises(InputError, match='looks of another data set'):
        Shelf(people(mono(64, instants=4), 2), g, tmp_path / 'looks')


# ---- several processes

SHARE = """
import os, sys, torch
torch.set_num_threads(1)
from accelerate import Accelerator
from spatialavatar0.pictures.domains import mono, people
from spatialavatar0.stage1.generator import from_preset
from spatialavatar0.stage1.schedule import LAPTOP, laptop_schedule
from spatialavatar0.stage1.trainer import Shelf, Trainer
from dataclasses import replace
g = from_preset('tiny', seed=0); acc = Accelerator(cpu=True)
t = Trainer(g, laptop_schedule(3, 0, 4, weights=replace(LAPTOP, jacobian=.1, face=1.)), [Shelf(people(mono(64, instants=6), 3), g)], 3, accelerator=acc)
assert t.world==2, t.world
t.backward(t.draw(), t.schedule[0].weights); grads = {n:p.grad.clone() for n,p in zip(t.names,t.params)}
t.rng.manual_seed(3); t.run(show=False)
from safetensors.torch import save_file
save_file({**{'g.'+k:v for k,v in grads.items()}, **{'w.'+n:p.detach() for n,p in zip(t.names,t.params)}}, sys.argv[1]+f'.{t.rank}')
"""


def test_two_processes_have_the_gradients_of_one(data, tmp_path):
    from safetensors.torch import load_file

    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]

    def env(r):
        return dict(
            os.environ,
            RANK=str(r),
            LOCAL_RANK=str(r),
            WORLD_SIZE='2',
            LOCAL_WORLD_SIZE='2',
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(port),
            OMP_NUM_THREADS='1',
            NUMBA_NUM_THREADS='1',
            ACCELERATE_USE_CPU='true',
        )

    ps = [
        subprocess.Popen(
            [sys.executable, '-c', SHARE, str(tmp_path / 'out')],
            env=env(r),
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in (0, 1)
    ]
    for p in ps:
        _, err = p.communicate(timeout=180)
        assert p.returncode == 0, err[-2000:]
    a, b = [load_file(str(tmp_path / f'out.{r}')) for r in (0, 1)]
    assert all(torch.equal(a[k], b[k]) for k in a)
    t = Trainer(
        network(),
        laptop_schedule(3, 0, 4, weights=replace(LAPTOP, jacobian=0.1, face=1.0)),
        data[:1],
        3,
    )
    t.backward(t.draw(), t.schedule[0].weights)
    for n, p in zip(t.names, t.params):
        g = p.grad
        assert torch.allclose(
            a['g.' + n], g, rtol=1e-3, atol=1e-5 * float(g.abs().max() + 1e-8) + 1e-9
        ), n
    t.rng.manual_seed(3)
    t.run(show=False)
    for n, p in zip(t.names, t.params):
        assert torch.allclose(a['w.' + n], p, atol=5e-3), (
            n
        )  # Adam's first steps magnify rounding of vanishing gradients


def test_a_batch_that_cannot_be_shared(data):
    class Three:
        process_index, num_processes = 0, 3

    with pytest.raises(InputError, match='batch of 2 cannot be shared by 3'):
        Trainer(network(), schedule(), data, accelerator=Three()).draw()


# ---- evaluation


def test_evaluate(data):
    g = network()
    clip = people(mono(64, instants=6), 1, seed=5)[0]
    trials = [Trial([clip[i] for i in range(4)], clip[j], 0) for j in (4, 5)]
    ready = looked(g, trials)
    a = evaluate(g, trials, 4)
    b = evaluate(g, ready, 4, batch=1)
    assert all(abs(a[k] - b[k]) < 1e-3 for k in a)
    assert evaluate(g, ready, 4) == evaluate(g, ready, 4)
    assert evaluate(g, ready, 1) != a
    assert set(a) == {'psnr', 'head_psnr', 'ssim'}
    assert not any(p.grad is not None for p in g.parameters())
    for K in (0, 5):
        with pytest.raises(InputError, match='K should be 1 to 4'):
            evaluate(g, ready, K)
    rgb = (
        g.render(g.encode([ready[0].sources[:1]]), [ready[0].target], torch.full((3,), 0.5))[0][0]
        .detach()
        .clamp(0, 1)
    )
    y, m = ready[0].target.target([0.5] * 3)
    mse = ((rgb - y) ** 2 * m[..., None]).sum() / (3 * m.sum())
    assert abs(evaluate(g, ready[:1], 1)['head_psnr'] + 10 * math.log10(float(mse))) < 1e-4
