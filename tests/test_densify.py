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
    Growth,
    carry_over,
    clone_and_split,
    densify,
    same_layout,
    select_growth,
    select_pruned,
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
    dice = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=dice)

    return dict(
        offsets=normal(n, 3),
        quats=normal(n, 4),
        log_scales=0.3 * normal(n, 3),
        logit_opacities=normal(n),
        sh0=normal(n, 3),
    )


def marks(*on, n=4):
    return torch.isin(torch.arange(n), torch.tensor(on, dtype=torch.long))


def growth(clone=(), split=()):
    return Growth(marks(*clone), marks(*split))


def copied(splats):
    return {k: v.clone() for k, v in splats.items()}


def covariance(splats):
    R = quat_to_mat(torch.nn.functional.normalize(splats['quats'], dim=-1))
    scales = splats['log_scales'].exp()
    return R @ torch.diag_embed(scales * scales) @ R.mT


def test_a_clone_is_the_same_once_more():
    old = some()
    new, rows, fresh = clone_and_split(old, growth(clone=[1]))
    assert rows.tolist() == [0, 1, 2, 3, 1]
    assert fresh.tolist() == [False] * 4 + [True]
    for k, v in old.items():
        assert torch.equal(new[k][:4], v)
        assert torch.equal(new[k][4], v[1])


def test_a_split_shrinks_the_covariance_and_keeps_its_axes():
    old = some()
    dice = torch.Generator().manual_seed(0)
    new, rows, fresh = clone_and_split(old, growth(split=[2]), dice)
    assert rows.tolist() == [0, 1, 3, 2, 2]
    assert fresh.tolist() == [False] * 3 + [True] * 2
    shrunk = covariance(old)[2] / 1.6**2
    torch.testing.assert_close(covariance(new)[3:], shrunk.expand(2, 3, 3))
    for k in ('quats', 'logit_opacities', 'sh0'):
        assert torch.equal(new[k][3:], old[k][[2, 2]])


def test_children_are_drawn_from_their_parent():
    one = {k: v[:1].expand(20_000, *v.shape[1:]) for k, v in some().items()}
    every = torch.ones(20_000, dtype=torch.bool)
    dice = torch.Generator().manual_seed(1)
    new = clone_and_split(one, Growth(~every, every), dice).splats
    moved = new['offsets'] - one['offsets'][0]
    wanted = covariance(one)[0]
    torch.testing.assert_close(moved.T @ moved / len(moved), wanted, atol=0.03, rtol=0.03)


def test_growth_leaves_its_input_alone():
    old = some()
    before = copied(old)
    clone_and_split(old, growth(clone=[0], split=[1]))
    assert all(torch.equal(old[k], before[k]) for k in old)


def test_nothing_selected_nothing_grows():
    old = some()
    new, rows, fresh = clone_and_split(old, growth())
    assert rows.tolist() == [0, 1, 2, 3]
    assert not fresh.any()
    assert all(torch.equal(old[k], new[k]) for k in old)


def test_small_ones_are_cloned_large_ones_split():
    cfg = DensifyConfig()
    scales = torch.tensor([0.001, 0.02, 0.001, 0.02])[:, None].repeat(1, 3)
    clone, split = select_growth(torch.tensor([1, 1, 0, 0]) * 2 * cfg.grad, scales, cfg)
    assert clone.tolist() == [True, False, False, False]
    assert split.tolist() == [False, True, False, False]


def test_the_faint_and_the_huge_go_but_no_triangle_is_left_bare():
    opacities = torch.tensor([0.9, 0.001, 0.9, 0.001, 0.001, 0.001])
    scales = torch.full((6, 3), 0.001)
    scales[2, 0] = 1.0
    face_ids = torch.tensor([0, 0, 0, 1, 2, 2])
    out = select_pruned(opacities, scales, face_ids, DensifyConfig())
    assert out.tolist() == [False, True, True, False, False, False]


def test_optimiser_goes_on_for_the_kept_and_begins_anew_for_the_new():
    old = torch.zeros(3, 2, requires_grad=True)
    opt = torch.optim.Adam([dict(params=[old], lr=0.1, name='x')], fused=True)
    for _ in range(3):
        old.grad = torch.arange(6.0).reshape(3, 2)
        opt.step()
    before = copied(opt.state[old])
    new = torch.zeros(4, 2, requires_grad=True)
    rows, fresh = torch.tensor([2, 0, 1, 1]), torch.tensor([False, False, False, True])
    carry_over(opt, dict(x=new), rows, fresh)
    assert list(opt.state) == [new]
    assert opt.param_groups[0]['params'][0] is new
    assert opt.state[new]['step'] == 3
    for k in ('exp_avg', 'exp_avg_sq'):
        assert torch.equal(opt.state[new][k][:3], before[k][[2, 0, 1]])
        assert not opt.state[new][k][3].any()
    new.grad = torch.ones(4, 2)
    opt.step()
    assert torch.isfinite(new).all() and (new < 0).all()


def test_carrying_over_nothing_changes_nothing():
    def walk(stop):
        at = torch.ones(3, requires_grad=True)
        opt = torch.optim.Adam([dict(params=[at], lr=0.1, name='x')])
        for t in range(6):
            if t == stop:
                same = at.detach().clone().requires_grad_()
                carry_over(opt, dict(x=same), torch.arange(3), torch.zeros(3, dtype=torch.bool))
                at = same
            at.grad = (at.detach() * torch.tensor([1.0, 2, 3])).sin()
            opt.step()
        return at.detach()

    assert torch.equal(walk(None), walk(3))


@pytest.fixture(scope='module')
def run(start, clip):
    run = Densification(start, clip, DensifyConfig(begin=0.2, every=0.1, reset=9.0), 40)
    run.rows = []
    for _ in range(30):
        run.step()
        run.rows.append(run.row())
    return run


def test_counts_add_up(run, start):
    assert run.rows[0]['count'] == len(start)
    assert run.rows[-1]['count'] == len(run.root) == len(run.result()) > len(start)
    assert all(len(t) == len(run.root) for d in (run.start, run.delta) for t in d.values())
    for way in run.delta.values():
        assert all(run.opt.state[way][k].shape == way.shape for k in ('exp_avg', 'exp_avg_sq'))


def test_children_sit_on_their_parents_triangle(run, start):
    binding, root = run.result().binding, run.root
    assert torch.equal(binding.face_ids, start.binding.face_ids[root])
    assert torch.equal(binding.bary, start.binding.bary[root])
    assert set(binding.face_ids.tolist()) == set(start.binding.face_ids.tolist())  # none left bare


def test_the_result_is_what_the_loop_renders(run, clip):
    frame = clip[0]
    wall = torch.tensor([0.2, 0.5, 0.8])
    with torch.no_grad():
        camera = frame.viewmat, frame.K, 64, 64
        rgb, _ = run.result().render(*camera, background=wall, **frame.pose)
    torch.testing.assert_close(run.loss(run.view(0), wall).rgb, rgb, atol=1e-5, rtol=0)


def test_a_reset_caps_opacity_and_forgets_its_moments(start, clip):
    run = Densification(start, clip, DensifyConfig(begin=2.0), 40)
    for _ in range(3):
        run.step()
    before = copied(run.splats())
    run.reset_opacities()
    after = run.splats()
    assert after['logit_opacities'].sigmoid().max() <= 0.01 + 1e-6
    assert all(torch.equal(before[k], after[k]) for k in RAW if k != 'logit_opacities')
    for k in RAW:
        state = run.opt.state[run.delta[k]]
        assert state['step'] == 3
        assert bool(state['exp_avg_sq'].any()) == (k != 'logit_opacities')


def test_schedule(start, clip, monkeypatch):
    seen = dict(grow_and_prune=[], reset_opacities=[])
    for name, steps in seen.items():
        monkeypatch.setattr(Densification, name, lambda self, s=steps: s.append(self.step_number))
    densify(start, clip, 24, config=DensifyConfig(begin=1 / 4, every=1 / 8, reset=1 / 3))
    assert seen == dict(grow_and_prune=[6, 9, 12, 15, 18, 21], reset_opacities=[8, 16])


def test_same_seed_same_result(start, clip):
    cfg = DensifyConfig(begin=0.2, every=0.2)
    runs = [densify(start, clip, 12, config=cfg, seed=seed) for seed in (1, 1, 2)]
    (one, log), (again, _), (other, _) = runs
    assert len(one) == len(again)
    assert all(torch.equal(one.splats[k], again.splats[k]) for k in RAW)
    assert log[-1]['count'] <= len(one) * 2
    assert len(one) != len(other) or not torch.equal(one.splats['sh0'], other.splats['sh0'])
    assert set(log[0]) == {'step', 'loss', 'psnr', 'count', 'seconds'}


def test_start_is_left_as_it_was(start, clip):
    before = copied(start.splats)
    densify(start, clip, 8, config=DensifyConfig(begin=0.2, every=0.2))
    assert all(torch.equal(start.splats[k], before[k]) for k in before)


def test_budget_ends_a_run(start, clip):
    assert densify(start, clip, 10_000, budget_seconds=0)[1][-1]['step'] == 0


def test_cannot_be_resumed(run, tmp_path):
    for method in (run.save, run.load):
        with pytest.raises(InputError, match='cannot be stopped and resumed'):
            method(tmp_path / 'state.safetensors')


def test_saved_measured_and_loaded(run, clip, tmp_path):
    made = run.result()
    made.save(tmp_path / 'a.safetensors')
    back = Avatar.load(tmp_path / 'a.safetensors')
    assert len(made) == len(back)
    assert measure(made, clip[:2]) == measure(back, clip[:2])


def test_who_needs_the_layout_says_so(run, start, clip):
    made = run.result()
    assert made.binding.resolution == 0
    assert not same_layout(made.binding, start.binding)
    assert same_layout(start.binding, start.binding)
    with pytest.raises(InputError, match='no UV layout'):
        made.binding.to_map(made.seen)
    with pytest.raises(InputError, match='no UV layout'):
        refine(made, clip, 2)
    refined, _ = refine(made, clip, 2, config=paper_config())  # the paper's own needs none
    assert len(refined) == len(made)


def test_empty_clip(start):
    with pytest.raises(InputError, match='clip is empty'):
        densify(start, Clip([]))


def test_other_backgrounds_do_not_grow_more(start, clip):
    "A frame that the avatar explains perfectly asks for no growth."
    frame = clip[0]
    camera = frame.viewmat, frame.K, 64, 64
    rgb, alpha = [x.detach() for x in start.render(*camera, **frame.pose)]
    person = (rgb / alpha[..., None].clamp_min(1e-3)).clamp(0, 1)
    perfect = replace(frame, image=person, mask=alpha)

    def pulled(frame):
        cfg = DensifyConfig(begin=9.0, reset=9.0, large=0.0, far=0.0)
        run = Densification(start, Clip([frame]), cfg, 40)
        run.step()
        return int((run.pull > 2e-4).sum())

    assert pulled(perfect) < 0.5 * pulled(frame)
