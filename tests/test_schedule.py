"""Stage 1's training: every loss against a case done by hand, the sampler's statistics, the draws,
resume after kill -9, several processes, what stops it."""

import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import intrinsics
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.clips import Clip
from spatialavatar0.pictures.domains import Trial, mono, multi, people
from spatialavatar0.pictures.fast_metrics import open_lpips
from spatialavatar0.pictures.metrics import blur_matrix, ms_ssim
from spatialavatar0.pipeline import TrainOptions, _network_of, phases_of
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
    weighted_sum,
)
from spatialavatar0.stage1.schedule import (
    LAPTOP,
    MonoPhase,
    MultiPhase,
    Roll,
    choose_pictures,
    dissimilarity,
    draw_mono,
    draw_multi,
    laptop_schedule,
    paper_schedule,
    source_chances,
    temperature,
)
from spatialavatar0.stage1.trainer import BadBatch, Shelf, Trainer, look_at_trials, score_generator

FULL = replace(LAPTOP, face=1.0, jacobian=0.1, ms_ssim=0.5)
HEAD = open_head()


def network(seed=0):
    return from_preset('tiny', HEAD, seed)


def schedule(mono_steps=4, multi_steps=3, **changes):
    return laptop_schedule(mono_steps, multi_steps, 2, **changes)


@pytest.fixture(scope='module')
def data():
    generator = network()
    many, few = people(mono(64, instants=6), 3), people(multi(64, instants=5, cameras=5), 2)
    return [Shelf(many, generator), Shelf(few, generator)]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one.params, other.params))


# ---- losses


def test_ms_ssim_of_flat_pictures_is_the_brightness_term():
    light, dark = torch.full((2, 24, 24, 3), 0.6), torch.full((2, 24, 24, 3), 0.3)
    brightness = (2 * 0.6 * 0.3 + 1e-4) / (0.36 + 0.09 + 1e-4)  # every structure term is 1
    assert torch.allclose(ms_ssim(light, dark), torch.full((2,), brightness), atol=2e-3)
    assert torch.allclose(ms_ssim(light, light), torch.ones(2), atol=1e-5)


def ssim_of(mean_a, mean_b, var_a, var_b, cov):
    "Brightness times structure."
    brightness = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    return brightness * (2 * cov + 9e-4) / (var_a + var_b + 9e-4)


def moments_of(means):
    "Means, variances and covariance from the windowed means of a, b, a², b² and ab."
    mean_a, mean_b, square_a, square_b, product = means
    variances = square_a - mean_a**2, square_b - mean_b**2
    return mean_a, mean_b, *variances, product - mean_a * mean_b


def test_ms_ssim_of_one_scale_by_hand():
    a, b = torch.rand(2, 1, 9, 9, 3, generator=rng())
    window = blur_matrix(9, 2.0).float()
    assert torch.allclose(window.sum(1), torch.ones(9))
    products = torch.stack([a, b, a * a, b * b, a * b])[:, 0, ..., 0]
    places = list(itertools.product(range(9), repeat=2))
    by_loops = [sum(window[4, i] * window[4, j] * x[i, j] for i, j in places) for x in products]
    middle = ssim_of(*moments_of(by_loops))
    full = ssim_of(*moments_of(window @ products @ window.T))
    assert torch.allclose(full[4, 4], middle, atol=1e-4)
    found = ms_ssim(a[..., :1], b[..., :1], (2.0,))
    assert torch.allclose(found, full.mean()[None], atol=1e-5)


def test_ms_ssim_sees_what_one_window_does_not():
    step = 0.5 * torch.ones(1, 48, 48, 3)
    step[:, :, 24:] = 0.6
    wrong = step.flip(2)  # a wide step the wrong way round
    assert ms_ssim(step, wrong) < ms_ssim(step, wrong, (0.5,)) < 1


def test_face_box_is_dilated_and_cut():
    camera = torch.eye(4), intrinsics(100.0, 100, 100), 100, 100
    face = torch.tensor([[-0.1, -0.2, 1.0], [0.1, 0.2, 1.0]])  # pixels 40..60 by 30..70
    assert face_box(face, *camera, 1.0) == (40, 30, 60, 70)
    assert face_box(face, *camera) == (34, 17, 66, 83)
    assert face_box(face * torch.tensor([9.0, 9.0, 1.0]), *camera) == (0, 0, 100, 100)
    x0, y0, x1, y1 = face_box(face + torch.tensor([9.0, 9.0, 0]), *camera)
    assert x1 > x0  # out of the picture: still a pixel
    assert y1 > y0


def test_box_l1_counts_the_box_alone():
    black, spots = torch.zeros(2, 10, 10, 3)
    spots[2:4, 5:9] = 0.5
    spots[9, 9] = 1
    assert float(box_l1(black, spots, (5, 2, 9, 4))) == 0.5
    assert float(box_l1(black, spots, (5, 2, 9, 6))) == 0.25


def test_uv_tv_by_hand_and_gaps_do_not_count():
    binding = network().binding
    across, down = texel_pairs(binding)
    row, column = binding.texels.T.float()
    plane = torch.stack([3 * column - 2 * row], -1)[None]
    assert torch.allclose(uv_tv(plane, (across, down)), torch.tensor(5.0))
    for pairs, step in ((across, (0, 1)), (down, (1, 0))):
        steps = binding.texels[pairs[:, 1]] - binding.texels[pairs[:, 0]]
        assert (steps == torch.tensor(step)).all()


def test_view_jacobian_averages_to_the_frobenius_norm():
    A, B = torch.randn(2, 4, 5, generator=rng())
    gamma = torch.randn(1, 5, generator=rng(1)).requires_grad_()
    total = 0.0
    for probe in itertools.product((-1.0, 1.0), repeat=4):  # all sign vectors: the mean is exact
        v = torch.tensor(probe)[None]
        total += view_jacobian((gamma @ A.T, gamma @ B.T), gamma, (v, v)).expm1()
    norm = (A.square().sum() + B.square().sum())[None]
    assert torch.allclose(total / 16, norm, rtol=1e-5)


def test_view_jacobian_can_be_trained():
    weights = torch.randn(3, 2, generator=rng()).requires_grad_()
    gamma = torch.randn(1, 2, generator=rng(1)).requires_grad_()
    probe = signs((1, 3), rng(2))

    def penalty(weights):
        return view_jacobian((torch.tanh(gamma @ weights.T),), gamma, (probe,)).sum()

    penalty(weights).backward()
    step = torch.zeros(3, 2)
    step[1, 0] = 1e-3
    slope = float((penalty(weights + step) - penalty(weights - step)).detach()) / 2e-3
    assert weights.grad.any()
    assert abs(slope - float(weights.grad[1, 0])) < 1e-3


def test_l2_sp_is_a_sum_and_its_gradient_is_twice_the_way():
    home = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    params = [torch.tensor([1.5, 2.0]).requires_grad_(), torch.tensor([[1.0]]).requires_grad_()]
    assert float(l2_sp(params, home)) == 0.25 + 4.0
    for param in params:
        param.grad = torch.ones_like(param)
    pull_home(params, home, 0.1)
    assert torch.allclose(params[0].grad, torch.tensor([1.1, 1.0]))
    assert torch.allclose(params[1].grad, torch.tensor([[1 - 0.4]]))


def test_terms_of_a_batch_are_what_they_say(data):
    trainer = Trainer(network(), schedule(), data)
    batch = trainer.draw()
    weights = replace(FULL, residual=1e-2)
    gaussians = len(trainer.generator.binding)
    batch.probes = [signs((2, gaussians, 3), rng(seed)) for seed in (1, 2)]
    with torch.no_grad():
        trainer.generator.residual.out['color'].bias.fill_(0.2)
    seen = trainer.render(batch, weights)
    terms, each = trainer.terms(batch, weights)
    expected = dict(
        l1=(seen.rgb - seen.truth).abs().mean(),
        ms_ssim=1 - ms_ssim(seen.rgb, seen.truth).mean(),
        residual=torch.tensor(0.2 / 4),
        offset=seen.decoded.maps['position'].square().mean(),
    )
    for name, value in expected.items():
        assert abs(float(terms[name].detach()) - float(value.detach())) < 1e-5, name
    assert each.shape == (2,)
    assert terms['jacobian'] > 0
    assert terms['face'] > 0
    assert set(terms) == {*expected, 'ssim', 'face', 'tv', 'jacobian'}


def test_lpips_is_real_or_left_out(monkeypatch, data, capsys):
    import spatialavatar0.ground.assets as assets

    monkeypatch.setattr(assets, 'find_local', lambda asset: None)
    assert open_lpips() is None
    trainer = Trainer(network(), schedule(weights=replace(LAPTOP, lpips=1.0)), data)
    assert 'LPIPS' in capsys.readouterr().out
    assert 'lpips' not in trainer.step()


# ---- who is shown


def roll(times=6, cameras=5):
    pictures, draws = times * cameras, rng(3)
    directions = torch.randn(pictures, 3, generator=draws)
    return Roll(
        torch.nn.functional.normalize(directions, dim=-1),
        torch.randn(pictures, 5, generator=draws),
        [i // cameras for i in range(pictures)],
        [f'{i % cameras:02d}' for i in range(pictures)],
        'person 7',
    )


def test_dissimilarity_counts_both_parts_alike():
    whole = roll()
    unlike = dissimilarity(whole.directions, whole.exprs, 2)
    others = torch.arange(len(whole)) != 2
    assert abs(float(unlike[others].mean()) - 2) < 1e-5
    assert float(unlike[2]) < 1e-2
    louder = dissimilarity(whole.directions, 100 * whole.exprs, 2)
    assert torch.allclose(unlike, louder, atol=1e-4)  # no unit matters
    one_expression = dissimilarity(whole.directions, 0 * whole.exprs, 2)
    assert abs(float(one_expression[others].mean()) - 1) < 1e-5  # the angle decides


def test_temperature_and_softmax_by_hand():
    assert [temperature(t, 1000) for t in (0, 125, 250, 999)] == [2.0, 1.25, 0.5, 0.5]
    chances = source_chances(torch.tensor([1.0, 2.0]), 0.5)
    assert abs(float(chances[1] / chances[0]) - math.exp(2)) < 1e-4


def test_drawn_as_often_as_the_softmax_says():
    whole, draws, count = roll(2, 3), rng(5), 3000
    drawn = torch.zeros(6, 6)
    for _ in range(count):
        sources, target = choose_pictures(whole, torch.arange(6), 2, 0.5, draws)
        drawn[target, sources[0]] += 1
        assert target not in sources
        assert len(set(sources)) == 2
    assert (drawn.sum(1) / count - 1 / 6).abs().max() < 0.02
    for target in range(6):
        chances = source_chances(dissimilarity(whole.directions, whole.exprs, target), 0.5)
        chances[target] = 0
        off = drawn[target] / drawn[target].sum() - chances / chances.sum()
        assert off.abs().max() < 4 * math.sqrt(0.25 / (count / 6))


def test_colder_prefers_the_different():
    whole, everything = roll(), torch.arange(30)

    def mean(T):
        "Dissimilarity of source 0."
        draws, total = rng(1), 0.0
        for _ in range(200):
            sources, target = choose_pictures(whole, everything, 1, T, draws)
            total += float(dissimilarity(whole.directions, whole.exprs, target)[sources[0]])
        return total / 200

    assert mean(0.25) > mean(0.5) > mean(2.0) + 0.1


def touched(whole, sources, target):
    "Instants and cameras of a draw."
    places = *sources, target
    return {whole.times[i] for i in places}, {whole.cameras[i] for i in places}


def test_phase_2_draws():
    whole, draws, crossed = roll(), rng(2), 0
    for i in range(1200):
        K = min(1 + i % 4, 3)
        sources, target = draw_multi(whole, K, 1.0, draws)
        times, cameras = touched(whole, sources, target)
        assert len(sources) == K
        assert len({*sources, target}) == K + 1
        if len(times) == 1:
            assert len(cameras) == K + 1
        else:
            crossed += 1
            assert len(times) == K + 1
            assert K > 1 or len(cameras) == 1
    assert abs(crossed / 1200 - 0.25) < 0.05


@pytest.mark.parametrize('cross_time, instants', [(0.0, 1), (1.0, 3)])
def test_phase_2_draws_of_one_kind(cross_time, instants):
    whole, draws = roll(), rng(2)
    for _ in range(50):
        drawn = draw_multi(whole, 2, 1.0, draws, cross_time=cross_time)
        assert len(touched(whole, *drawn)[0]) == instants


def test_what_cannot_be_drawn():
    whole, draws = roll(), rng()
    with pytest.raises(InputError, match='K should be at least 1'):
        draw_mono(whole, 0, 1.0, draws)
    with pytest.raises(InputError, match='person 7: 30 sources and a target need 31'):
        draw_mono(whole, 30, 1.0, draws)
    with pytest.raises(InputError, match='cross-time with 6 sources needs 7 instants; there are 6'):
        draw_multi(whole, 6, 1.0, draws, cross_time=1.0)
    columns = whole.directions, whole.exprs, whole.times, whole.cameras
    gone = Roll(*[column[:-1] for column in columns], 'person 7')
    with pytest.raises(InputError, match="camera '04' is missing at instant 5"):
        draw_multi(gone, 1, 1.0, draws)


# ---- the schedule


def test_papers_numbers():
    first, second = paper_schedule()
    assert (first.steps, first.batch, first.clip) == (200_000, 48, 5.0)
    assert first.weights == Weights()
    assert (second.batch, second.cross_time) == (12, 0.25)
    assert (second.weights.l2sp, second.weights.residual) == (1e-3, 1e-2)
    assert (second.layer_decay, second.bf16) == (0.65, True)
    assert first.rate(0) == 2.5e-4
    assert abs(first.rate(80_000) - 0.55 * 2.5e-4) < 1e-12
    assert all(abs(first.rate(t) - 2.5e-5) < 1e-12 for t in (160_000, 199_999))
    assert second.rate(0) < 1e-6
    assert abs(second.rate(1000) - 1e-4) < 1e-6
    assert second.rate(second.steps - 1) < 1e-9
    weight = torch.zeros(1).requires_grad_()
    assert type(first.optimiser([weight])) is torch.optim.Adam
    groups = [dict(params=[torch.zeros_like(weight)]), dict(params=[weight], residual=True)]
    other = second.optimiser(groups)
    assert type(other) is torch.optim.AdamW
    assert [group['weight_decay'] for group in other.param_groups] == [0, 1e-2]


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
    small = ['encoder.down.0.0.weight', 'encoder.down.3.0.weight', 'encoder.fine.weight']
    assert layer_scales(small, 0.5) == [0.0625, 0.5, 1.0]


def test_loss_falls_and_phases_follow(data):
    phases = [MonoPhase(30, 2, 3e-3, LAPTOP, warmup=3), schedule(4, 4)[1]]
    trainer = Trainer(network(), phases, data)
    batch = trainer.draw()

    def cost():
        return float(weighted_sum(LAPTOP, trainer.terms(batch, LAPTOP)[0]).detach())

    first = cost()
    trainer.run(30, show=False)
    assert cost() < 0.93 * first
    optimiser = trainer.opt
    before = [param.detach().clone() for param in trainer.params]
    trainer.run(show=False)
    assert trainer.opt is not optimiser
    assert type(trainer.opt) is torch.optim.AdamW
    assert all(map(torch.equal, trainer.home, before))
    assert not torch.equal(trainer.params[0], trainer.home[0])
    assert trainer.log[-1]['phase'] == 'multi'
    assert trainer.log[-1]['l2sp'] > 0


def test_a_stronger_spring_keeps_closer(data):
    def way(spring):
        phase = MultiPhase(6, 2, 1e-3, replace(LAPTOP, l2sp=spring))
        trainer = Trainer(network(), [phase], data[1:])
        trainer.run(show=False)
        return float(l2_sp(trainer.params, trainer.home))

    assert way(10.0) < 0.7 * way(1e-9)


# ---- resume

RUN = """
import os
import sys

import torch
from spatialavatar0.pictures.domains import mono, multi, people
from spatialavatar0.stage1.generator import from_preset
from spatialavatar0.stage1.schedule import laptop_schedule
from spatialavatar0.stage1.trainer import Shelf, Trainer

path, mode = sys.argv[1:]
torch.set_num_threads(1)
generator = from_preset('tiny', seed=0)
many, few = people(mono(64, instants=6), 3), people(multi(64, instants=5, cameras=5), 2)
data = [Shelf(many, generator), Shelf(few, generator)]


def tell(trainer):
    trainer.save(path)
    print(trainer.step_number, flush=True)
    if mode == 'wait' and trainer.step_number == 5:
        input()


trainer = Trainer(generator, laptop_schedule(4, 3, 2), data, 3)
if os.path.exists(path):
    trainer.load(path)
trainer.run(callback=tell, show=False)
"""


def a_run(state, mode):
    "A training in a process of its own, which goes on from a state if there is one."
    env = dict(os.environ, OMP_NUM_THREADS='1', NUMBA_NUM_THREADS='1')
    call = [sys.executable, '-c', RUN, str(state), mode]
    pipes = dict(stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    return subprocess.Popen(call, env=env, **pipes)


def killed_after_five(state):
    "A run, killed in Phase 2."
    process = a_run(state, 'wait')
    for line in process.stdout:
        if line.strip() == '5':
            break
    process.send_signal(signal.SIGKILL)
    process.wait()


def finished(state):
    "What a run, or the rest of one, leaves in its state."
    told, _ = a_run(state, 'end').communicate(timeout=300)
    assert told.split()[-1] == '7'
    return load_file(state)


def test_killed_and_resumed(tmp_path):
    """kill -9 in Phase 2; a new process goes on and ends with the weights of an undisturbed run, to
    the last bit. The first of three runs is there to compile: what a process has compiled itself
    rounds differently from what it finds compiled."""
    finished(tmp_path / 'first.safetensors')
    whole = finished(tmp_path / 'whole.safetensors')
    state = tmp_path / 'state.safetensors'
    killed_after_five(state)
    killed = load_file(state)
    resumed = finished(state)
    for name in whole:
        assert torch.equal(resumed[name], whole[name]), name
    assert not all(torch.equal(killed[name], whole[name]) for name in whole)


def test_saved_and_loaded_is_the_same_to_the_last_bit(data, tmp_path):
    state = tmp_path / 's.safetensors'
    whole = Trainer(network(), schedule(), data, 3)
    whole.run(3, state=state, show=False)
    whole.run(show=False)
    resumed = Trainer(network(9), schedule(), data, 3)
    resumed.load(state)
    resumed.run(show=False)
    assert same(whole, resumed)
    assert whole.log[-1]['loss'] == resumed.log[-1]['loss']
    assert not list(tmp_path.glob('.*'))
    other_seed = Trainer(network(), schedule(), data, 4)
    other_seed.run(show=False)
    assert not same(whole, other_seed)


def test_ctrl_c_finishes_the_step(data, tmp_path, capsys):
    stopped = Trainer(network(), schedule(), data, 3)
    state = tmp_path / 's.safetensors'

    def interrupt(trainer):
        if trainer.step_number == 2:
            os.kill(os.getpid(), signal.SIGINT)

    stopped.run(state=state, callback=interrupt, show=False)
    assert stopped.step_number == 2
    assert 'stopped after 2 of 7' in capsys.readouterr().out
    resumed = Trainer(network(), schedule(), data, 3)
    resumed.load(state)
    resumed.run(show=False)
    whole = Trainer(network(), schedule(), data, 3)
    whole.run(show=False)
    assert same(resumed, whole)


def test_states_of_others_are_refused(data, tmp_path):
    trainer = Trainer(network(), schedule(), data)
    trainer.run(1, show=False)
    path = tmp_path / 's.safetensors'
    trainer.save(path)
    with pytest.raises(InputError, match='other work: seed .was 0, now 1. changed'):
        Trainer(network(), schedule(), data, 1).load(path)
    with pytest.raises(InputError, match='other work: .*steps of'):
        Trainer(network(), schedule(5), data).load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match='is not the state of a training'):
        trainer.load(path)
    trainer.generator.save(path)
    with pytest.raises(InputError, match='is not the state of a training'):
        trainer.load(path)


# ---- what stops it


def with_broken_target(batch):
    "The batch with a camera that is not finite."
    first, *rest = batch.targets
    return replace(batch, targets=[replace(first, K=float('nan') * first.K), *rest])


def test_nan_names_step_and_frame(data, tmp_path):
    trainer = Trainer(network(), schedule(), data, 3)
    trainer.run(1, show=False)
    good = [param.detach().clone() for param in trainer.params]
    before = trainer.rng.get_state()
    batch = trainer.draw()
    trainer.rng.set_state(before)
    trainer.draw = lambda: with_broken_target(batch)
    state, frame = tmp_path / 's.safetensors', batch.names[0].split(' (')[0]
    with pytest.raises(BadBatch, match=f'at step 1: Ks should be finite.*{frame}') as error:
        trainer.run(state=state, show=False)
    assert str(state) in str(error.value)
    assert all(map(torch.equal, trainer.params, good))
    resumed = Trainer(network(), schedule(), data, 3)
    resumed.load(state)
    resumed.run(show=False)
    whole = Trainer(network(), schedule(), data, 3)
    whole.run(show=False)
    assert same(resumed, whole)


def by_hands(hands, data):
    "Weights after a few steps of both phases."
    trainer = Trainer(network(), schedule(), data, 3, hands=hands)
    trainer.run(show=False)
    return torch.cat([param.detach().flatten() for param in trainer.params])


def test_threads_that_share_a_batch_take_the_same_steps(data):
    one, two, again = (by_hands(hands, data) for hands in (1, 2, 2))
    assert torch.equal(two, again)
    start = torch.cat([param.detach().flatten() for param in network().parameters()])
    assert (two - one).norm() < 0.02 * (one - start).norm()


def test_a_shared_gradient_lies_as_its_weight(data):
    trainer = Trainer(network(), schedule(), data, hands=2)
    trainer.backward(trainer.draw(), LAPTOP)
    for param in trainer.params:
        assert param.grad is None or param.grad.stride() == param.stride()


def test_how_many_share(data, monkeypatch):
    trainer = Trainer(network(), schedule(), data, hands=3)
    assert [trainer.hands_for(people) for people in (1, 2, 3, 4, 6)] == [1, 2, 3, 2, 3]
    monkeypatch.setattr('numba.threading_layer', lambda: 'workqueue')
    assert trainer.hands_for(4) == 1


def test_a_gradient_alone_may_be_bad(data):
    trainer = Trainer(network(), schedule(), data)
    bias = trainer.generator.heads.last['color'].bias
    bias.register_hook(lambda grad: grad * float('inf'))
    before = trainer.rng.get_state()
    with pytest.raises(BadBatch, match='at step 0: a gradient became nan or inf: person'):
        trainer.step()
    assert torch.equal(trainer.rng.get_state(), before)
    assert trainer.step_number == 0


def refuse_clips(clips, generator, match, **options):
    with pytest.raises(InputError, match=match):
        Shelf(clips, generator, **options)


def test_bad_data():
    generator = network()
    clip = Clip(people(mono(64, instants=3), 1)[0].frames)
    first, second, third = clip
    nan = Clip([first, replace(second, image=second.image * float('nan')), third])
    refuse_clips([clip, nan], generator, 'person 1, frame 1: .*NaN')
    refuse_clips([], generator, 'at least one person')
    refuse_clips([clip], generator, 'give a folder=', limit=1e4)
    without_jaw = {name: values for name, values in second.params.items() if name != 'jaw'}
    bare = Clip([first, replace(second, params=without_jaw)])
    refuse_clips([bare], generator, 'every frame needs the same ones')


def test_too_few_pictures():
    generator = network()
    clip = Clip(people(mono(64, instants=3), 1)[0].frames)
    trainer = Trainer(generator, schedule(), [[clip], [clip]])
    few = 'person 0: . sources and a target need . pictures; there are 3'
    with pytest.raises(InputError, match=few):
        for _ in range(20):
            trainer.draw()
    with pytest.raises(InputError, match='one data set per phase, 2; got 1'):
        Trainer(generator, schedule(), [[clip]])


def test_a_shelf_in_a_folder(tmp_path):
    generator, folder = network(), tmp_path / 'looks'
    crowd = people(mono(64, instants=3), 2)
    made, found = Shelf(crowd, generator, folder), Shelf(crowd, generator, folder)
    fresh = generator.look(crowd[1][2])
    for shelf in (made, found):
        kept = shelf.look(1, 2)
        for name in ('image', 'uv', 'weight', 'viewmat', 'K'):
            assert torch.equal(getattr(kept, name), getattr(fresh, name))
        for name, values in fresh.params.items():
            assert torch.equal(kept.params[name], values)
    assert found.rolls[1].times == [0, 1, 2]
    with pytest.raises(InputError, match='other work: .*the painted people.* changed'):
        Shelf(people(mono(64, instants=4), 2), generator, folder)


# ---- drawn ahead


@pytest.fixture(scope='module')
def on_disk(tmp_path_factory):
    "The data of `data`, kept in folders."
    folder = tmp_path_factory.mktemp('looks')
    many, few = people(mono(64, instants=6), 3), people(multi(64, instants=5, cameras=5), 2)
    return [Shelf(many, network(), folder / 'one'), Shelf(few, network(), folder / 'many')]


def test_ahead_is_not_other(data, on_disk, tmp_path):
    "From memory in turn, from a disk three ahead, stopped and gone on: the same to the bit."
    whole = Trainer(network(), schedule(), data, 3)
    assert whole.ahead == 0
    whole.run(show=False)
    early = Trainer(network(), schedule(), on_disk, 3, ahead=3, readers=2)
    early.run(show=False)
    assert same(whole, early)
    assert torch.equal(whole.rng.get_state(), early.rng.get_state())
    state = tmp_path / 's.safetensors'
    kept = Trainer(network(), schedule(), data, 3, ahead=2)
    kept.run(3, callback=lambda trainer: trainer.save(state), show=False)
    assert not kept.coming
    resumed = Trainer(network(9), schedule(), data, 3)
    resumed.load(state)
    for trainer in (kept, resumed):
        trainer.run(show=False)
        assert same(whole, trainer)


def test_looks_from_a_disk_are_read_by_default_ahead(on_disk):
    trainer = Trainer(network(), schedule(), on_disk, 3)
    assert trainer.ahead == 2
    trainer.step()
    assert len(trainer.coming) == 2
    one, other = on_disk[0].look(1, 2), on_disk[0].look(1, 2)
    assert torch.equal(one.image, other.image)
    assert one.image.data_ptr() != other.image.data_ptr()  # read, not mapped


def test_a_bad_step_ahead_leaves_the_state_before_it(data, tmp_path):
    trainer = Trainer(network(), schedule(), data, 3, ahead=2)
    trainer.run(1, show=False)
    before = trainer.random_state()
    bias = trainer.generator.heads.last['color'].bias
    ill = bias.register_hook(lambda grad: grad * float('inf'))
    with pytest.raises(BadBatch, match='at step 1: a gradient'):
        trainer.run(state=tmp_path / 's.safetensors', show=False)
    assert torch.equal(trainer.random_state(), before) and not trainer.coming
    ill.remove()
    trainer.run(show=False)
    whole = Trainer(network(), schedule(), data, 3)
    whole.run(show=False)
    assert same(trainer, whole)


def test_too_few_pictures_ahead():
    "An error of a thread that draws ahead is that of a trainer that does not."
    clip = Clip(people(mono(64, instants=3), 1)[0].frames)
    trainer = Trainer(network(), schedule(), [[clip], [clip]], ahead=2)
    with pytest.raises(InputError, match='person 0: . sources and a target need . pictures'):
        for _ in range(20):
            trainer.step()
    after = trainer.random_state()
    assert not trainer.coming  # nothing of a later step is left for the next call
    with pytest.raises(InputError, match='person 0: . sources and a target need . pictures'):
        trainer.draw()
    assert torch.equal(trainer.random_state(), after)


# ---- several processes

SHARE = """
import sys
import time
from dataclasses import replace

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from spatialavatar0.pictures.domains import mono, people
from spatialavatar0.stage1.generator import from_preset
from spatialavatar0.stage1.schedule import LAPTOP, laptop_schedule
from spatialavatar0.stage1.trainer import Shelf, Trainer

torch.set_num_threads(1)
generator = from_preset('tiny', seed=0)
accelerator = Accelerator(cpu=True)
plan = laptop_schedule(3, 0, 4, weights=replace(LAPTOP, jacobian=0.1, face=1.0))
data = [Shelf(people(mono(64, instants=6), 3), generator)]
trainer = Trainer(generator, plan, data, 3, accelerator=accelerator)
assert trainer.world == 2, trainer.world
trainer.backward(trainer.draw(), trainer.schedule[0].weights)
named = list(zip(trainer.names, trainer.params))
found = {'g.' + name: param.grad.clone() for name, param in named}
trainer.rng.manual_seed(3)
trainer.run(show=False)
found.update({'w.' + name: param.detach() for name, param in named})
save_file(found, f'{sys.argv[1]}.{trainer.rank}')
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def launch(rank, port, out, script=SHARE, words=()):
    "One of two processes: a script, or with words a command of ours."
    env = dict(
        os.environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
        LOCAL_WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        OMP_NUM_THREADS='1',
        NUMBA_NUM_THREADS='1',
        ACCELERATE_USE_CPU='true',
    )
    call = [sys.executable, '-c', script, str(out)]
    if words:
        call = [sys.executable, '-m', 'spatialavatar0', *words, '--out', str(out)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(call, env=env, **pipes)


@pytest.fixture(scope='module')
def of_two(tmp_path_factory):
    "Gradients and weights of two processes that shared each batch."
    out, port = tmp_path_factory.mktemp('shared') / 'out', free_port()
    for process in [launch(rank, port, out) for rank in (0, 1)]:
        _, said = process.communicate(timeout=180)
        assert process.returncode == 0, said[-2000:]
    first, second = (load_file(f'{out}.{rank}') for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    return first


def test_two_processes_have_the_gradients_of_one(data, of_two):
    plan = laptop_schedule(3, 0, 4, weights=replace(LAPTOP, jacobian=0.1, face=1.0))
    alone = Trainer(network(), plan, data[:1], 3)
    alone.backward(alone.draw(), alone.schedule[0].weights)
    for name, param in zip(alone.names, alone.params):
        shared, tolerance = of_two['g.' + name], 1e-5 * float(param.grad.abs().max() + 1e-8) + 1e-9
        assert torch.allclose(shared, param.grad, rtol=1e-3, atol=tolerance), name
    alone.rng.manual_seed(3)
    alone.run(show=False)
    for name, param in zip(alone.names, alone.params):
        # Adam's first steps magnify rounding of vanishing gradients
        assert torch.allclose(of_two['w.' + name], param, atol=5e-3), name


def test_a_batch_that_cannot_be_shared(data):
    class Three:
        process_index, num_processes = 0, 3

    with pytest.raises(InputError, match='batch of 2 cannot be shared by 3'):
        Trainer(network(), schedule(), data, accelerator=Three()).draw()


OTHER = (
    SHARE[: SHARE.index('trainer = Trainer(')].replace('mono(64, instants=6), 3', 'MANY')
    + """
from spatialavatar0.ground.core import InputError

try:
    Trainer(generator, plan, data, 3, accelerator=accelerator).run(show=False)
except InputError as why:
    print(why)
sys.stdout.flush()
torch.distributed.barrier()
import os
os._exit(0)  # gloo may abort while it is taken down
"""
)


def test_processes_with_different_data():
    port = free_port()
    scripts = [OTHER.replace('MANY', f'mono(64, instants=6), {count}') for count in (3, 2)]
    pair = [launch(rank, port, '', script) for rank, script in enumerate(scripts)]
    for process in pair:
        said, wrong = process.communicate(timeout=180)
        assert 'the pictures of mono differ between process 0 and process 1' in said, wrong
        assert len(said.splitlines()) == 1


FEW = 'train --preset tiny --people 2 --subjects 1 --steps'.split()


def test_a_command_in_several_processes_says_one_line(tmp_path):
    "One of two was told other things: the first says so, in one line; both end."
    port = free_port()
    words = [[*FEW, '10'], [*FEW, '10', '--recompute', '2', '--seed', '3']]
    pair = [launch(rank, port, tmp_path, words=words[rank]) for rank in (0, 1)]
    said = [process.communicate(timeout=180)[1] for process in pair]
    assert [process.returncode for process in pair] == [1, 1], said
    wanted = 'error: seed (was 0, now 3) differ between process 0 and process 1; give all'
    assert [line for line in said[0].splitlines() if 'rror' in line][0].startswith(wanted)
    assert 'rror' not in said[1] and 'Traceback' not in ''.join(said)


def wait_until_it_trains(out):
    "Both sets of looks are made; then a few steps more."
    while not (out / 'looks' / 'multi' / 'looks.bin').exists():
        time.sleep(0.1)
    time.sleep(12)


def step_of(state):
    with safe_open(state, 'pt') as file:
        return json.loads(file.metadata()['training'])['step']


slow = pytest.mark.skipif(not os.environ.get('SLOW'), reason='a minute; SLOW=1 runs it')


@slow
def test_a_killed_process_ends_the_others(tmp_path):
    port = free_port()
    pair = [launch(rank, port, tmp_path, words=[*FEW, '5000']) for rank in (0, 1)]
    wait_until_it_trains(tmp_path)
    pair[1].kill()
    _, said = pair[0].communicate(timeout=60)
    assert pair[0].returncode == 1
    told = [line for line in said.splitlines() if line.startswith('error')]
    assert len(told) == 1 and 'another process has ended' in told[0] and 'state' in told[0]
    assert 'learning rate' not in told[0]
    assert (tmp_path / 'state.safetensors').exists() and 'Traceback' not in said


@slow
def test_a_launched_command(tmp_path):
    "`accelerate launch` of two, interrupted; one process goes on to the end of an undisturbed run."
    words = [*FEW, '300']
    start = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu']  # also without one
    start += '--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no'.split()
    both, alone = tmp_path / 'both', tmp_path / 'alone'
    launcher = subprocess.Popen([*start, '-m', 'spatialavatar0', *words, '--out', str(both)])
    wait_until_it_trains(both)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=60) != 0
    assert 0 < step_of(both / 'state.safetensors') < 300
    one = dict(os.environ, OMP_NUM_THREADS='1', NUMBA_NUM_THREADS='1')
    for out in (both, alone):
        call = [sys.executable, '-m', 'spatialavatar0', *words, '--out', str(out)]
        subprocess.run(call, check=True, env=one)
    there, here = (load_file(out / 'generator.safetensors') for out in (alone, both))
    first = from_preset('tiny', seed=0).state_dict()

    def apart(one, other):
        return sum(float((one[name] - other[name]).square().sum()) for name in here) ** 0.5

    assert apart(here, there) < 0.2 * apart(there, first)  # sums in another order, by Adam enlarged


# ---- evaluation


@pytest.fixture(scope='module')
def questions():
    clip = people(mono(64, instants=6), 1, seed=5)[0]
    return [Trial([clip[i] for i in range(4)], clip[target], 0) for target in (4, 5)]


def test_evaluate(questions):
    generator = network()
    ready = look_at_trials(generator, questions)
    once, one_by_one = (
        score_generator(generator, questions, 4),
        score_generator(generator, ready, 4, batch=1),
    )
    assert all(abs(once[name] - one_by_one[name]) < 1e-3 for name in once)
    assert score_generator(generator, ready, 4) == score_generator(generator, ready, 4)
    assert score_generator(generator, ready, 1) != once
    assert set(once) == {'psnr', 'head_psnr', 'ssim'}
    assert not any(param.grad is not None for param in generator.parameters())
    for K in (0, 5):
        with pytest.raises(InputError, match='K should be 1 to 4'):
            score_generator(generator, ready, K)


@torch.no_grad()
def test_decibels_inside_the_head_by_hand(questions):
    generator = network()
    (trial, *_) = look_at_trials(generator, questions)
    code = generator.encode([trial.sources[:1]])
    rgb = generator.render(code, [trial.target], torch.full((3,), 0.5)).rgb[0].clamp(0, 1)
    truth, matte = trial.target.target([0.5] * 3)
    mse = ((rgb - truth) ** 2 * matte[..., None]).sum() / (3 * matte.sum())
    found = score_generator(generator, [trial], 1)['head_psnr']
    assert abs(found + 10 * math.log10(float(mse))) < 1e-4


TROUBLE = (
    SHARE[: SHARE.index('trainer.backward(')]
    + """
import os
import signal
from spatialavatar0.stage1.trainer import BadBatch

steps = []


def trouble(trainer):
    steps.append(trainer.step_number)
    if sys.argv[1] == 'stop' and trainer.rank == 0 and len(steps) == 1:
        os.kill(os.getpid(), signal.SIGINT)


def ill(*args):
    if steps and trainer.rank == 1:
        raise BadBatch('nan in frame 7')
    return sound(*args)


sound = trainer.terms
if sys.argv[1] == 'fail':
    trainer.terms = ill
try:
    trainer.run(callback=trouble, show=False)
    print('ended after', trainer.step_number)
except BadBatch as why:
    print('ended after', trainer.step_number, why)
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # gloo may abort while it is taken down
"""
)


@pytest.mark.parametrize('how', ['fail', 'stop'])
def test_nobody_waits_for_a_process_that_ended(how):
    port = free_port()
    pair = [launch(rank, port, how, TROUBLE) for rank in (0, 1)]
    said = [process.communicate(timeout=180)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    if how == 'fail':
        assert 'ended after 1 at step 1: process 1: nan in frame 7' in said[0]
        assert 'ended after 1 at step 1: nan in frame 7' in said[1]
    else:
        assert all('ended after 2' in words for words in said)  # the first to hear of it


# ---- the options of the command


def test_the_decay_of_layers_acts(data):
    "Of an unfrozen backbone each layer moves .65 times as far as the next; a frozen one rests."
    pytest.importorskip('timm')
    vit = dict(encoder=(), backbone='vit_tiny_patch16_dinov3_qkvb', token=192)
    phase = replace(schedule()[0], warmup=0, layer_decay=0.65)
    moved = {}
    for frozen in (False, True):
        generator = from_preset('tiny', HEAD, 0, weights=False, frozen=frozen, **vit)
        rng = torch.Generator().manual_seed(0)
        weights = dict(generator.named_parameters())
        with torch.no_grad():
            for name, x in weights.items():  # at first, nothing asks the backbone to move
                x += 0.05 * torch.randn(x.shape, generator=rng) * ('blocks' not in name)
        before = {name: x.detach().clone() for name, x in weights.items()}
        Trainer(generator, [phase], data[:1], 1).step()
        moved[frozen] = {
            name: float((x.detach() - before[name]).abs().max()) for name, x in weights.items()
        }
    blocks = [f'encoder.backbone.blocks.{n}.mlp.fc1.weight' for n in range(12)]
    for name, after in itertools.pairwise(blocks):
        assert abs(moved[False][name] / moved[False][after] - 0.65) < 0.03
        assert moved[True][name] == 0
    assert moved[True]['encoder.fine.weight'] > 0


def test_options_become_a_network_and_a_schedule():
    few = dict(preset='tiny', steps=100)
    plain = phases_of(TrainOptions(**few))
    assert [phase.steps for phase in plain] == [80, 20]
    asked = dict(weight_decay=0.3, unfrozen=True, accumulate=2, precision='fp32')
    first, second = phases_of(TrainOptions(**few, **asked))
    assert not hasattr(first, 'weight_decay') and second.weight_decay == 0.3
    assert {first.layer_decay, second.layer_decay} == {0.65}
    assert {first.accumulate, second.accumulate} == {2}
    paper = phases_of(TrainOptions(preset='paper'))
    assert paper == phases_of(TrainOptions(preset='ours')) == paper_schedule()
    both = phases_of(TrainOptions(preset='paper', precision='bf16', device='cuda'))
    assert [phase.bf16 for phase in both] == [True, True]
    with pytest.raises(InputError, match='bf16 is for a GPU'):
        phases_of(TrainOptions(precision='bf16'))
    with pytest.raises(InputError, match='no backbone to unfreeze'):
        _network_of(TrainOptions(preset='tiny', unfrozen=True), HEAD)
    network = _network_of(TrainOptions(preset='tiny', pool='plain', teeth=False, recompute=3), HEAD)
    assert (network.config.pool, network.config.teeth, network.recompute) == ('plain', False, 3)
