"""The compiled binding against the readable one in float64: values, gradients, threads, degenerate
triangles, what falls back, bad input."""

import numba as nb
import pytest
import torch
import torch.nn.functional as F

import spatialavatar0.splats.kernels as kernels
from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import axis_angle_to_mat
from spatialavatar0.head.head import open_head
from spatialavatar0.splats.binding import (
    Binding,
    TriangleFrames,
    bind_frames,
    bind_uv,
    new_splats,
    place,
)
from spatialavatar0.splats.kernels import fast_frames, fast_place, fast_to_world

LOCAL = ('offsets', 'quats', 'log_scales')


def sheet(n=9, seed=0):
    """A bent, jittered grid in any orientation: verts (n*n,3), faces, one vertex at the end that
    belongs to no face."""
    g = torch.Generator().manual_seed(seed)
    i = torch.arange((n - 1) * n).reshape(n - 1, n)[:, :-1].flatten()
    xy = torch.cartesian_prod(*[torch.linspace(-1, 1, n)] * 2) + 0.15 / n * torch.randn(
        n * n, 2, generator=g
    )
    v = torch.cat(
        [xy, (xy**2).sum(-1, keepdim=True) * 0.4 + 0.1 * torch.randn(n * n, 1, generator=g) / n], -1
    )
    v = v @ axis_angle_to_mat(2 * torch.randn(3, generator=g)).T + torch.randn(3, generator=g)
    return torch.cat([v, torch.zeros(1, 3)]), torch.cat(
        [torch.stack([i, i + n, i + 1], -1), torch.stack([i + 1, i + n, i + n + 1], -1)]
    )


def scattered(faces, n, seed=0, owners=None):
    "n Gaussians on random faces (of the first `owners`), many to a face, some faces without."
    g = torch.Generator().manual_seed(seed)
    b = torch.rand(n, 3, generator=g) + 0.02
    return Binding(
        torch.randint(owners or max(1, len(faces)), (n,), generator=g),
        b / b.sum(-1, keepdim=True),
        torch.zeros(n, 2, dtype=torch.long),
        faces,
        1,
    )


def local(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(
        offsets=0.5 * torch.randn(n, 3, generator=g),
        quats=2 * torch.randn(n, 4, generator=g),
        log_scales=torch.randn(n, 3, generator=g) - 1,
    )


def run(splats, binding, verts, backend='auto', dtype=torch.float32, seed=5):
    "Outputs of to_world, and gradients of a random weighting of them, by name."
    g = torch.Generator().manual_seed(seed)
    x = {k: splats[k].detach().to(dtype).clone().requires_grad_() for k in LOCAL}
    v = verts.detach().to(dtype).clone().requires_grad_()
    out = fast_to_world(x, binding, v, backend)
    torch.autograd.backward(out, [torch.randn(o.shape, generator=g).to(dtype) for o in out])
    return dict(means=out[0].detach(), quats=out[1].detach(), scales=out[2].detach()), {
        k: t.grad for k, t in dict(x, verts=v).items()
    }


def agree(fast, slow, eps):
    for k in slow:
        assert (fast[k] - slow[k]).norm() <= eps * slow[k].norm(), (
            f'{k}: relative error {float((fast[k] - slow[k]).norm() / slow[k].norm()):.1e}'
        )


@pytest.fixture(scope='module')
def head():
    return open_head()


@pytest.mark.parametrize('seed', range(8))
def test_sheets_against_float64(seed):
    v, f = sheet(seed=seed)
    b, s = scattered(f, 300, seed), local(300, seed)
    values, grads = run(s, b, v, 'numba')
    true_values, true_grads = run(s, b, v, 'torch', torch.float64)
    agree(values, true_values, 1e-6)
    agree(grads, true_grads, 1e-5)
    assert not grads['verts'][-1].any()  # nobody's vertex


@pytest.mark.parametrize('resolution', (24, 96))
def test_the_head_against_float64(head, resolution):
    b = bind_uv(head, resolution)
    v = head(expr=0.5 * torch.randn(1, head.num_expr, generator=torch.Generator().manual_seed(1)))[
        0
    ]
    start = new_splats(b, head, v)
    noise = local(len(b))
    s = {k: start[k] + 0.3 * noise[k] for k in LOCAL}
    values, grads = run(s, b, v, 'numba')
    true_values, true_grads = run(s, b, v, 'torch', torch.float64)
    agree(values, true_values, 1e-6)
    agree(grads, true_grads, 1e-5)


@pytest.mark.parametrize('size', (1e-3, 1.0, 1e3))
def test_any_unit_of_length(size):
    v, f = sheet()
    b, s = scattered(f, 200), local(200)
    values, grads = run(s, b, size * v, 'numba')
    true_values, true_grads = run(s, b, size * v, 'torch', torch.float64)
    agree(values, true_values, 1e-6)
    agree(grads, true_grads, 1e-5)


def turns():
    """Rotations in which each of the four quaternion components is the largest, also nearly tied,
    and with w near 0."""
    half = torch.pi * torch.eye(3)
    ties = torch.tensor([[1.0, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1]])
    return [
        *half,
        *(0.999 * half),
        *(-0.999 * half),
        *(F.normalize(ties, dim=-1) * torch.pi * 0.99),
        *(F.normalize(-ties, dim=-1) * 2.0),
        torch.zeros(3),
    ]


@pytest.mark.parametrize('turn', turns(), ids=lambda t: ' '.join(f'{x:.2f}' for x in t.tolist()))
def test_every_branch_of_the_quaternion(turn):
    frame = torch.tensor(
        [[0.0, 0, 0], [0.8, 0, 0], [0.2, 0, -0.6]]
    )  # its own frame is the identity
    v = frame @ axis_angle_to_mat(turn + 0.003).T
    b = scattered(torch.tensor([[0, 1, 2]]), 6)
    s = local(6)
    fast = fast_frames(b, v, 'numba')
    slow = bind_frames(b, v.double())
    assert (fast.quats - slow.quats).abs().max() < 1e-6
    assert (fast.quats[:, 0] >= 0).all()  # the sign, too
    agree(run(s, b, v, 'numba')[1], run(s, b, v, 'torch', torch.float64)[1], 1e-5)


def test_gradients_against_finite_differences():
    "Central differences of the float64 values, no autograd in between."
    v, f = sheet(4, seed=3)
    b, s = scattered(f, 20, 3), local(20, 3)
    _, grads = run(s, b, v, 'numba')
    w = [
        torch.randn(20, k, generator=g)
        for g in [torch.Generator().manual_seed(5)]
        for k in (3, 4, 3)
    ]

    def loss(x):
        return sum((o * c).sum() for o, c in zip(fast_to_world(x, b, x['verts']), w))

    base = {k: t.double() for k, t in dict(s, verts=v).items()}
    for k in base:
        for i in torch.randperm(base[k].numel(), generator=torch.Generator().manual_seed(1))[:8]:
            d = torch.zeros(base[k].numel(), dtype=torch.float64)
            d[i] = 1e-6
            d = d.view_as(base[k])
            slope = (
                loss(dict(base, **{k: base[k] + d})) - loss(dict(base, **{k: base[k] - d}))
            ) / 2e-6
            assert abs(slope - grads[k].flatten()[i]) < 1e-4 * grads[k].abs().max(), k


@pytest.mark.skipif(nb.config.NUMBA_NUM_THREADS < 2, reason='needs two threads')
def test_threads_do_not_change_a_bit(head):
    b, v = bind_uv(head, 64), head()[0]
    s = local(len(b))
    found, before = [], nb.get_num_threads()
    try:
        for n in (1, 2, 2, 1):
            nb.set_num_threads(n)
            found.append(run(s, b, v, 'numba'))
    finally:
        nb.set_num_threads(before)
    for values, grads in found[1:]:
        for a, c in ((values, found[0][0]), (grads, found[0][1])):
            assert all(torch.equal(a[k], c[k]) for k in c)


COLLAPSED = {
    'first edge': [[0.0, 0, 0], [0, 0, 0], [1, 0, 0]],
    'second edge': [[0.0, 0, 0], [1, 0, 0], [0, 0, 0]],
    'third edge': [[0.0, 0, 0], [1, 0, 0], [1, 0, 0]],
    'point': [[0.3, 0.2, 0.1]] * 3,
    'line': [[0.0, 0, 0], [1, 0, 0], [2, 0, 0]],
    'slanted line': [[0.0, 0, 0], [0.1, 0.2, 0.3], [0.2, 0.4, 0.6]],
}


@pytest.mark.parametrize('shape', COLLAPSED)
@pytest.mark.parametrize('backend', ('numba', 'torch'))
def test_triangles_without_area(shape, backend):
    v = torch.cat([torch.tensor(COLLAPSED[shape]), torch.tensor([[0.0, 1, 0], [1.0, 1, 1]])])
    f = torch.tensor([[0, 1, 2], [0, 3, 4]])
    b, s = scattered(f, 40), local(40)
    values, grads = run(s, b, v, backend)
    for x in (*values.values(), *grads.values()):
        assert x.isfinite().all()
    lone = run(
        {k: t[b.face_ids == 0] for k, t in s.items()},
        Binding(
            b.face_ids[b.face_ids == 0], b.bary[b.face_ids == 0], b.texels[b.face_ids == 0], f, 1
        ),
        v,
        'numba',
    )[1]
    assert (
        lone['verts'].abs().max() < 1e3
    )  # finite and not enormous: it gets no torque about its edge


@pytest.mark.parametrize('shape', ('first edge', 'second edge', 'point', 'line'))
def test_collapsed_values_are_the_readable_ones(shape):
    v = torch.tensor(COLLAPSED[shape])
    b = scattered(torch.tensor([[0, 1, 2]]), 5)
    fast = fast_frames(b, v, 'numba')
    slow = bind_frames(b, v)
    for k in ('points', 'quats', 'scales'):
        assert torch.allclose(getattr(fast, k), getattr(slow, k), atol=1e-6), k


def test_nobody_there():
    v, f = sheet()
    b, s = scattered(f, 0), local(0)
    values, grads = run(s, b, v, 'numba')
    assert values['means'].shape == (0, 3)
    assert values['quats'].shape == (0, 4)
    assert not grads['verts'].any()
    assert grads['offsets'].shape == (0, 3)
    assert len(fast_frames(scattered(f[:0], 0), v).points) == 0  # no face either


def test_one_face_for_all():
    v, f = sheet()
    b, s = scattered(f, 500, owners=1), local(500)
    values, grads = run(s, b, v, 'numba')
    agree(grads, run(s, b, v, 'torch', torch.float64)[1], 1e-5)
    assert sorted(grads['verts'].abs().sum(-1).nonzero()[:, 0].tolist()) == sorted(f[0].tolist())


def test_float64_and_batches_take_the_readable_way(monkeypatch):
    for name in ('_Bind', '_Place'):
        monkeypatch.setattr(kernels, name, None)  # calling it would fail
    v, f = sheet()
    b, s = scattered(f, 50), local(50)
    many = torch.stack([v, 2 * v, v + 1])
    assert (
        fast_to_world({k: t.double() for k, t in s.items()}, b, v.double())[0].dtype
        == torch.float64
    )
    together = fast_to_world(s, b, many)
    assert together[0].shape == (3, 50, 3)
    assert together[2].shape == (3, 50, 3)
    alone = fast_to_world(s, b, many[1], 'torch')
    for a, c in zip(together, alone):
        assert torch.allclose(a[1], c, atol=1e-6)
    with pytest.raises((TypeError, AttributeError)):
        fast_to_world(s, b, v)  # and this is the fast way


@pytest.mark.parametrize(
    'wanted',
    [('offsets',), ('quats',), ('log_scales',), ('verts',), ('offsets', 'verts'), LOCAL],
    ids=' '.join,
)
def test_only_some_gradients(wanted):
    v, f = sheet()
    b, s = scattered(f, 60), local(60)
    _, every = run(s, b, v, 'numba')
    x = {k: t.clone().requires_grad_(k in wanted) for k, t in dict(s, verts=v).items()}
    out = fast_to_world(x, b, x['verts'])
    g = torch.Generator().manual_seed(5)
    torch.autograd.backward(out, [torch.randn(o.shape, generator=g) for o in out])
    for k in x:
        assert torch.equal(x[k].grad, every[k]) if k in wanted else x[k].grad is None


def test_each_output_alone():
    v, f = sheet()
    b, s = scattered(f, 60), local(60)
    for i in range(3):
        got = []
        for dtype, backend in ((torch.float32, 'numba'), (torch.float64, 'torch')):
            x = {k: t.to(dtype).clone().requires_grad_() for k, t in dict(s, verts=v).items()}
            weight = torch.linspace(-1, 1, 60, dtype=dtype)[:, None]
            (fast_to_world(x, b, x['verts'], backend)[i] * weight).sum().backward()
            got.append({k: torch.zeros_like(t) if t.grad is None else t.grad for k, t in x.items()})
        agree(*got, 1e-5)


def test_frozen_mesh(monkeypatch):
    v, f = sheet()
    b, s = scattered(f, 80), local(80)
    frames = fast_frames(b, v)
    assert not any(x.requires_grad for x in (frames.points, frames.quats, frames.scales))
    monkeypatch.setattr(kernels, 'place_backward_frames', None)
    monkeypatch.setattr(kernels, 'bind_backward', None)  # nobody asks for them
    x = {k: t.clone().requires_grad_() for k, t in s.items()}
    y = {k: t.double().requires_grad_() for k, t in s.items()}
    sum((o**3).sum() for o in fast_place(x, frames)).backward()
    sum((o**3).sum() for o in place(y, bind_frames(b, v.double()))).backward()
    agree({k: t.grad for k, t in x.items()}, {k: t.grad for k, t in y.items()}, 1e-5)
    with torch.no_grad():
        assert not fast_place(x, frames)[0].requires_grad


def test_place_answers_to_its_frames():
    "Also frames that are leaves, with quaternions pulled along their own direction."
    v, f = sheet()
    b, s = scattered(f, 40), local(40)
    frames = fast_frames(b, v)
    got = []
    for dtype, backend in ((torch.float32, 'numba'), (torch.float64, 'torch')):
        leaves = [
            t.detach().to(dtype).clone().requires_grad_()
            for t in (frames.points, frames.quats, frames.scales)
        ]
        sum(
            (o**3).sum()
            for o in fast_place(
                {k: t.to(dtype) for k, t in s.items()}, TriangleFrames(*leaves), backend
            )
        ).backward()
        got.append(dict(zip(('points', 'quats', 'scales'), (t.grad for t in leaves))))
    agree(*got, 1e-5)


def test_strides_do_not_matter():
    v, f = sheet()
    b, s = scattered(f, 60), local(60)

    def loose(t):
        return torch.cat([t, t], -1).T.contiguous().T[:, : t.shape[-1]]

    assert not loose(v).is_contiguous()
    for a, c in zip(
        fast_to_world({k: loose(t) for k, t in s.items()}, b, loose(v)), fast_to_world(s, b, v)
    ):
        assert torch.equal(a, c)


def test_a_nan_stays_with_its_own():
    v, f = sheet()
    b, s = scattered(f, 200), local(200)
    hurt = v.clone()
    hurt[f[3, 0]] = float('nan')
    touched = (f[b.face_ids] == f[3, 0]).any(-1)
    for backend in ('numba', 'torch'):
        means, quats, scales = fast_to_world(s, b, hurt, backend)
        for x in (means, quats, scales):
            assert x[~touched].isfinite().all()
        assert means[touched].isnan().all()
        bad = {k: t.clone() for k, t in s.items()}
        bad['offsets'][7] = float('inf')
        bad['quats'][9] = float('nan')
        means, quats, _ = fast_to_world(bad, b, v, backend)
        assert not means[7].isfinite().any()
        assert quats[9].isnan().all()
        assert quats[:9].isfinite().all()
        assert means[8:].isfinite().all()


def test_an_input_changed_too_early_is_noticed():
    v, f = sheet()
    b, s = scattered(f, 20), local(20)
    x = {k: t.clone().requires_grad_() for k, t in s.items()}
    leaf = v.clone().requires_grad_()
    means, _, _ = fast_to_world(x, b, leaf)
    with torch.no_grad():
        x['offsets'] += 1
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        means.sum().backward()


@pytest.mark.parametrize(
    'call,words',
    (
        (
            lambda s, b, v: fast_to_world(s, b, v, 'cuda'),
            "backend should be 'auto', 'torch' or 'numba'; got 'cuda'",
        ),
        (lambda s, b, v: fast_frames(b, v.double(), 'numba'), 'float64 on cpu'),
        (lambda s, b, v: fast_frames(b, v[None], 'numba'), "use backend='torch'"),
        (
            lambda s, b, v: fast_place(
                dict(s, offsets=s['offsets'][:3]), fast_frames(b, v), 'numba'
            ),
            'takes float32 CPU tensors of shapes',
        ),
        (lambda s, b, v: fast_frames(b, v[:20]), 'verts should have at least 81 rows'),
        (
            lambda s, b, v: fast_frames(Binding(b.face_ids + 200, b.bary, b.texels, b.faces, 1), v),
            'face_ids should be from 0 to 127',
        ),
        (
            lambda s, b, v: fast_frames(Binding(b.face_ids, b.bary[:9], b.texels, b.faces, 1), v),
            'bary should be .30,3., one row per face_id',
        ),
        (
            lambda s, b, v: fast_frames(Binding(b.face_ids, b.bary, b.texels, b.faces - 1, 1), v),
            'faces should hold vertex indices from 0; got -1',
        ),
    ),
)
def test_bad_input(call, words):
    v, f = sheet()
    with pytest.raises(InputError, match=words):
        call(local(30), scattered(f, 30), v)


def test_a_binding_cannot_be_rewired():
    v, f = sheet()
    b = scattered(f, 5)
    with pytest.raises(AttributeError):
        b.faces = f.flip(0)
