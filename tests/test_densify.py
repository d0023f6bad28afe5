"""Cloning, splitting, pruning, fading: by hand, and inside the loop."""

from dataclasses import replace

import pytest
import torch

from spatialavatar0.avatar.avatar import Avatar
from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import quat_to_mat
from spatialavatar0.pictures.clips import Clip
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.stage2.densify import (
    Densification,
    DensifyConfig,
    carry_over,
    densify,
    doomed,
    grow,
    same_layout,
    wants,
)
from spatialavatar0.stage2.loop import measure, refine
from spatialavatar0.stage2.refine import RAW, paper_config


@pytest.fixture(scope='module')
def clip():
    return Clip(list(mono_clip(make_person(3), 8, 64)))


@pytest.fixture(scope='module')
def start(clip):
    return from_frame(clip[0], 32)


def some(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)

    def r(*s):
        return torch.randn(*s, generator=g)

    return dict(
        offsets=r(n, 3), quats=r(n, 4), log_scales=0.3 * r(n, 3), logit_opacities=r(n), sh0=r(n, 3)
    )


def marks(*on, n=4):
    return torch.isin(torch.arange(n), torch.tensor(on, dtype=torch.long))


def covariance(x):
    R = quat_to_mat(torch.nn.functional.normalize(x['quats'], dim=-1))
    s = x['log_scales'].exp()
    return R @ torch.diag_embed(s * s) @ R.mT


def test_a_clone_is_the_same_once_more():
    x = some()
    y, rows, fresh = grow(x, marks(1), marks())
    assert rows.tolist() == [0, 1, 2, 3, 1]
    assert fresh.tolist() == [False] * 4 + [True]
    for k, v in x.items():
        assert torch.equal(y[k][:4], v)
        assert torch.equal(y[k][4], v[1])


def test_a_split_shrinks_the_covariance_and_keeps_its_axes():
    x = some()
    y, rows, fresh = grow(x, marks(), marks(2), torch.Generator().manual_seed(0))
    assert rows.tolist() == [0, 1, 3, 2, 2]
    assert fresh.tolist() == [False] * 3 + [True] * 2
    torch.testing.assert_close(covariance(y)[3:], (covariance(x)[2] / 1.6**2).expand(2, 3, 3))
    for k in ('quats', 'logit_opacities', 'sh0'):
        assert torch.equal(y[k][3:], x[k][[2, 2]])


def test_children_are_drawn_from_their_parent():
    x = {k: v[:1].expand(20_000, *v.shape[1:]) for k, v in some().items()}
    every = torch.ones(20_000, dtype=torch.bool)
    y, *_ = grow(x, ~every, every, torch.Generator().manual_seed(1))
    d = y['offsets'] - x['offsets'][0]
    torch.testing.assert_close(d.T @ d / len(d), covariance(x)[0], atol=0.03, rtol=0.03)


def test_grow_leaves_its_input_alone():
    x = some()
    before = {k: v.clone() for k, v in x.items()}
    grow(x, marks(0), marks(1))
    assert all(torch.equal(x[k], before[k]) for k in x)


def test_nobody_asks_nobody_grows():
    x = some()
    y, rows, fresh = grow(x, marks(), marks())
    assert rows.tolist() == [0, 1, 2, 3]
    assert not fresh.any()
    assert all(torch.equal(x[k], y[k]) for k in x)


def test_small_ones_are_cloned_large_ones_split():
    cfg = DensifyConfig()
    scales = torch.tensor([0.001, 0.02, 0.001, 0.02])[:, None].repeat(1, 3)
    clone, split = wants(torch.tensor([1, 1, 0, 0]) * 2 * cfg.grad, scales, cfg)
    assert clone.tolist() == [True, False, False, False]
    assert split.tolist() == [
        False,
        True,
        False,
        False,
    ]


def test_the_faint_and_the_huge_go_but_no_triangle_is_left_bare():
    o = torch.tensor([0.9, 0.001, 0.9, 0.001, 0.001, 0.001])
    s = torch.full((6, 3), 0.001)
    s[2, 0] = 1.0
    out = doomed(o, s, torch.tensor([0, 0, 0, 1, 2, 2]), DensifyConfig())
    assert out.tolist() == [False, True, True, False, False, False]


def test_optimiser_goes_on_for_the_kept_and_begins_anew_for_the_new():
    p = torch.zeros(3, 2, requires_grad=True)
    opt = torch.optim.Adam([dict(params=[p], lr=0.1, name='x')], fused=True)
    for _ in range(3):
        p.grad = torch.arange(6.0).reshape(3, 2)
        opt.step()
    old = {k: v.clone() for k, v in opt.state[p].items()}
    q = torch.zeros(4, 2, requires_grad=True)
    carry_over(
        opt, dict(x=q), torch.tensor([2, 0, 1, 1]), torch.tensor([False, False, False, True])
    )
    assert list(opt.state) == [q]
    assert opt.param_groups[0]['params'][0] is q
    assert opt.state[q]['step'] == 3
    for k in ('exp_avg', 'exp_avg_sq'):
        assert torch.equal(opt.state[q][k][:3], old[k][[2, 0, 1]])
        assert not opt.state[q][k][3].any()
    q.grad = torch.ones(4, 2)
    opt.step()
    assert torch.isfinite(q).all() and (q < 0).all()


def test_carrying_over_nothing_changes_nothing():
    def walk(stop):
        p = torch.ones(3, requires_grad=True)
        opt = torch.optim.Adam([dict(params=[p], lr=0.1, name='x')])
        for t in range(6):
            if t == stop:
                q = p.detach().clone().requires_grad_()
                carry_over(opt, dict(x=q), torch.arange(3), torch.zeros(3, dtype=torch.bool))
                p = q
            p.grad = (p.detach() * torch.tensor([1.0, 2, 3])).sin()
            opt.step()
        return p.detach()

    assert torch.equal(walk(None), walk(3))


@pytest.fixture(scope='module')
def run(start, clip):
    r = Densification(start, clip, DensifyConfig(begin=0.2, every=0.1, reset=9.0), 40)
    r.rows = [r.step() for _ in range(30)]
    return r


def test_counts_add_up(run, start):
    assert run.rows[0]['count'] == len(start)
    assert run.rows[-1]['count'] == len(run.root) == len(run.result()) > len(start)
    assert all(len(t) == len(run.root) for d in (run.start, run.delta) for t in d.values())
    for p in run.delta.values():
        assert all(run.opt.state[p][k].shape == p.shape for k in ('exp_avg', 'exp_avg_sq'))


def test_children_sit_on_their_parents_triangle(run, start):
    b, root = run.result().binding, run.root
    assert torch.equal(b.face_ids, start.binding.face_ids[root])
    assert torch.equal(b.bary, start.binding.bary[root])
    assert set(b.face_ids.tolist()) == set(start.binding.face_ids.tolist())  # none left bare


def test_the_result_is_what_the_loop_renders(run, clip):
    f = clip[0]
    view = run.view(0)
    bg = torch.tensor([0.2, 0.5, 0.8])
    with torch.no_grad():
        a = run.result().render(f.viewmat, f.K, 64, 64, background=bg, **f.pose)[0]
    torch.testing.assert_close(run.loss(view, bg)[1], a, atol=1e-5, rtol=0)


def test_fading_caps_opacity_and_forgets_its_moments(start, clip):
    r = Densification(start, clip, DensifyConfig(begin=2.0), 40)
    for _ in range(3):
        r.step()
    before = {k: v.detach().clone() for k, v in r.splats().items()}
    r.fade()
    after = r.splats()
    assert after['logit_opacities'].sigmoid().max() <= 0.01 + 1e-6
    assert all(torch.equal(before[k], after[k]) for k in RAW if k != 'logit_opacities')
    for k in RAW:
        s = r.opt.state[r.delta[k]]
        assert s['step'] == 3
        assert bool(s['exp_avg_sq'].any()) == (k != 'logit_opacities')


def test_schedule(start, clip, monkeypatch):
    seen = dict(multiply=[], fade=[])
    for k in seen:
        monkeypatch.setattr(Densification, k, lambda self, k=k: seen[k].append(self.step_number))
    densify(start, clip, 24, config=DensifyConfig(begin=1 / 4, every=1 / 8, reset=1 / 3))
    assert seen == dict(multiply=[6, 9, 12, 15, 18, 21], fade=[8, 16])


def test_same_seed_same_result(start, clip):
    cfg = DensifyConfig(begin=0.2, every=0.2)
    (a, la), (b, _), (c, _) = [densify(start, clip, 12, config=cfg, seed=s) for s in (1, 1, 2)]
    assert len(a) == len(b)
    assert all(torch.equal(a.splats[k], b.splats[k]) for k in RAW)
    assert la[-1]['count'] <= len(a) * 2
    assert len(a) != len(c) or not torch.equal(a.splats['sh0'], c.splats['sh0'])
    assert set(la[0]) == {'step', 'loss', 'psnr', 'count', 'seconds'}


def test_start_is_left_as_it_was(start, clip):
    before = {k: v.clone() for k, v in start.splats.items()}
    densify(start, clip, 8, config=DensifyConfig(begin=0.2, every=0.2))
    assert all(torch.equal(start.splats[k], before[k]) for k in before)


def test_budget_ends_a_run(start, clip):
    assert densify(start, clip, 10_000, budget_seconds=0)[1][-1]['step'] == 0


def test_saved_measured_and_loaded(run, clip, tmp_path):
    a = run.result()
    a.save(tmp_path / 'a.safetensors')
    b = Avatar.load(tmp_path / 'a.safetensors')
    assert len(a) == len(b)
    assert measure(a, clip[:2]) == measure(b, clip[:2])


def test_who_needs_the_layout_says_so(run, start, clip):
    a = run.result()
    assert a.binding.resolution == 0
    assert not same_layout(a.binding, start.binding)
    assert same_layout(start.binding, start.binding)
    with pytest.raises(InputError, match='no UV layout'):
        a.binding.to_map(a.seen)
    with pytest.raises(InputError, match='no UV layout'):
        refine(a, clip, 2)
    assert len(refine(a, clip, 2, config=paper_config())[0]) == len(a)  # the paper's own needs none


def test_empty_clip(start):
    with pytest.raises(InputError, match='clip is empty'):
        densify(start, Clip([]))


def test_other_backgrounds_do_not_grow_more(start, clip):
    "A frame that the avatar explains perfectly asks for no growth."
    f = clip[0]
    rgb, alpha = [x.detach() for x in start.render(f.viewmat, f.K, 64, 64, **f.pose)]
    perfect = replace(f, image=(rgb / alpha[..., None].clamp_min(1e-3)).clamp(0, 1), mask=alpha)
    r = Densification(
        start, Clip([perfect]), DensifyConfig(begin=9.0, reset=9.0, large=0.0, far=0.0), 40
    )
    r.step()
    few = int((r.pull > 2e-4).sum())
    r = Densification(start, Clip([f]), DensifyConfig(begin=9.0, reset=9.0, large=0.0, far=0.0), 40)
    r.step()
    assert few < 0.5 * int((r.pull > 2e-4).sum())
