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
    to_world,
)
from spatialavatar0.splats.kernels import fast_frames, fast_place, fast_to_world

LOCAL = 'offsets', 'quats', 'log_scales'
FRAME = 'points', 'quats', 'scales'


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sheet(n=9, seed=0):
    """A bent, jittered grid in any orientation: verts (n*n,3), faces, one vertex at the end that
    belongs to no face."""
    g = seeded(seed)
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, n)] * 2)
    xy = grid + 0.15 / n * torch.randn(n * n, 2, generator=g)
    z = (xy**2).sum(-1, keepdim=True) * 0.4 + 0.1 * torch.randn(n * n, 1, generator=g) / n
    turn = axis_angle_to_mat(2 * torch.randn(3, generator=g))
    verts = torch.cat([xy, z], -1) @ turn.T + torch.randn(3, generator=g)
    i = torch.arange((n - 1) * n).reshape(n - 1, n)[:, :-1].flatten()
    lower = torch.stack([i, i + n, i + 1], -1)
    upper = torch.stack([i + 1, i + n, i + n + 1], -1)
    return torch.cat([verts, torch.zeros(1, 3)]), torch.cat([lower, upper])


def scattered(faces, n, seed=0, owners=None):
    "n Gaussians on random faces (of the first `owners`), many to a face, some faces without."
    g = seeded(seed)
    weights = torch.rand(n, 3, generator=g) + 0.02
    bary = weights / weights.sum(-1, keepdim=True)
    face_ids = torch.randint(owners or max(1, len(faces)), (n,), generator=g)
    return Binding(face_ids, bary, torch.zeros(n, 2, dtype=torch.long), faces, 1)


def local(n, seed=0):
    "Random attributes of n Gaussians."
    g = seeded(seed)
    return dict(
        offsets=0.5 * torch.randn(n, 3, generator=g),
        quats=2 * torch.randn(n, 4, generator=g),
        log_scales=torch.randn(n, 3, generator=g) - 1,
    )


def scene(n, seed=0):
    "Vertices of a sheet, n Gaussians on it, and their attributes."
    verts, faces = sheet(seed=seed)
    return verts, scattered(faces, n, seed), local(n, seed)


def leaves_of(tensors, dtype=torch.float32):
    return {k: t.detach().to(dtype).clone().requires_grad_() for k, t in tensors.items()}


def run(splats, binding, verts, backend='auto', dtype=torch.float32):
    "Outputs of fast_to_world, and gradients of a random weighting of them, by name."
    g = seeded(5)
    leaves = leaves_of({k: splats[k] for k in LOCAL} | dict(verts=verts), dtype)
    out = fast_to_world(leaves, binding, leaves['verts'], backend)
    torch.autograd.backward(out, [torch.randn(o.shape, generator=g).to(dtype) for o in out])
    values = {k: o.detach() for k, o in out._asdict().items()}
    return values, {k: t.grad for k, t in leaves.items()}


def agree(fast, slow, eps):
    for k in slow:
        error = float((fast[k] - slow[k]).norm() / slow[k].norm().clamp_min(1e-30))
        assert (fast[k] - slow[k]).norm() <= eps * slow[k].norm(), f'{k}: relative {error:.1e}'


def fast_is_true(splats, binding, verts):
    "The compiled form in float32 against the readable one in float64, values and gradients."
    values, grads = run(splats, binding, verts, 'numba')
    true_values, true_grads = run(splats, binding, verts, 'torch', torch.float64)
    agree(values, true_values, 1e-6)
    agree(grads, true_grads, 1e-5)
    return values, grads


@pytest.fixture(scope='module')
def head():
    return open_head()


@pytest.mark.parametrize('seed', range(8))
def test_sheets_against_float64(seed):
    verts, binding, splats = scene(300, seed)
    _, grads = fast_is_true(splats, binding, verts)
    assert not grads['verts'][-1].any()  # nobody's vertex


@pytest.mark.parametrize('resolution', (24, 96))
def test_the_head_against_float64(head, resolution):
    binding = bind_uv(head, resolution)
    verts = head(expr=0.5 * torch.randn(1, head.num_expr, generator=seeded(1)))[0]
    start = new_splats(binding, head, verts)
    noise = local(len(binding))
    fast_is_true({k: start[k] + 0.3 * noise[k] for k in LOCAL}, binding, verts)


@pytest.mark.parametrize('size', (1e-3, 1.0, 1e3))
def test_any_unit_of_length(size):
    verts, binding, splats = scene(200)
    fast_is_true(splats, binding, size * verts)


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
    upright = torch.tensor([[0.0, 0, 0], [0.8, 0, 0], [0.2, 0, -0.6]])  # its frame: the identity
    verts = upright @ axis_angle_to_mat(turn + 0.003).T
    binding, splats = scattered(torch.tensor([[0, 1, 2]]), 6), local(6)
    fast = fast_frames(binding, verts, 'numba')
    slow = bind_frames(binding, verts.double())
    assert (fast.quats - slow.quats).abs().max() < 1e-6
    assert (fast.quats[:, 0] >= 0).all()  # the sign, too
    _, grads = run(splats, binding, verts, 'numba')
    agree(grads, run(splats, binding, verts, 'torch', torch.float64)[1], 1e-5)


def test_gradients_against_finite_differences():
    "Central differences of the float64 values, no autograd in between."
    verts, faces = sheet(4, seed=3)
    binding, splats = scattered(faces, 20, 3), local(20, 3)
    _, grads = run(splats, binding, verts, 'numba')
    g = seeded(5)
    weights = [torch.randn(20, k, generator=g) for k in (3, 4, 3)]

    def loss(inputs):
        world = to_world(inputs, binding, inputs['verts'])
        return sum((o * w).sum() for o, w in zip(world, weights))

    base = {k: t.double() for k, t in dict(splats, verts=verts).items()}
    for k, values in base.items():
        for i in torch.randperm(values.numel(), generator=seeded(1))[:8]:
            step = torch.zeros_like(values)
            step.view(-1)[i] = 1e-6
            change = loss({**base, k: values + step}) - loss({**base, k: values - step})
            assert abs(change / 2e-6 - grads[k].flatten()[i]) < 1e-4 * grads[k].abs().max(), k


@pytest.mark.skipif(nb.config.NUMBA_NUM_THREADS < 2, reason='needs two threads')
def test_threads_do_not_change_a_bit(head):
    binding, verts = bind_uv(head, 64), head()[0]
    splats = local(len(binding))
    found, before = [], nb.get_num_threads()
    try:
        for n in (1, 2, 2, 1):
            nb.set_num_threads(n)
            found.append(run(splats, binding, verts, 'numba'))
    finally:
        nb.set_num_threads(before)
    first_values, first_grads = found[0]
    for values, grads in found[1:]:
        assert all(torch.equal(values[k], first_values[k]) for k in values)
        assert all(torch.equal(grads[k], first_grads[k]) for k in grads)


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
    "Finite, and not enormous: such a triangle gets no torque about its edge."
    verts = torch.cat([torch.tensor(COLLAPSED[shape]), torch.tensor([[0.0, 1, 0], [1.0, 1, 1]])])
    faces = torch.tensor([[0, 1, 2], [0, 3, 4]])
    binding, splats = scattered(faces, 40), local(40)
    values, grads = run(splats, binding, verts, backend)
    for x in (*values.values(), *grads.values()):
        assert x.isfinite().all()
    flat = binding.face_ids == 0
    texels = binding.texels[flat]
    alone = Binding(binding.face_ids[flat], binding.bary[flat], texels, faces, 1)
    _, grads = run({k: t[flat] for k, t in splats.items()}, alone, verts, 'numba')
    assert grads['verts'].abs().max() < 1e3


@pytest.mark.parametrize('shape', ('first edge', 'second edge', 'point', 'line'))
def test_collapsed_values_are_the_readable_ones(shape):
    verts = torch.tensor(COLLAPSED[shape])
    binding = scattered(torch.tensor([[0, 1, 2]]), 5)
    fast = fast_frames(binding, verts, 'numba')
    slow = bind_frames(binding, verts)
    for k in FRAME:
        assert torch.allclose(getattr(fast, k), getattr(slow, k), atol=1e-6), k


def test_nobody_there():
    verts, binding, splats = scene(0)
    values, grads = run(splats, binding, verts, 'numba')
    assert values['means'].shape == (0, 3)
    assert values['quats'].shape == (0, 4)
    assert not grads['verts'].any()
    assert grads['offsets'].shape == (0, 3)
    no_face = scattered(binding.faces[:0], 0)
    assert len(fast_frames(no_face, verts).points) == 0


def test_one_face_for_all():
    verts, faces = sheet()
    binding, splats = scattered(faces, 500, owners=1), local(500)
    _, grads = run(splats, binding, verts, 'numba')
    agree(grads, run(splats, binding, verts, 'torch', torch.float64)[1], 1e-5)
    pulled = grads['verts'].abs().sum(-1).nonzero()[:, 0]
    assert sorted(pulled.tolist()) == sorted(faces[0].tolist())


def test_float64_and_batches_take_the_readable_way(monkeypatch):
    for name in ('_Bind', '_Place'):
        monkeypatch.setattr(kernels, name, None)  # calling it would fail
    verts, binding, splats = scene(50)
    exact = {k: t.double() for k, t in splats.items()}
    assert fast_to_world(exact, binding, verts.double()).means.dtype == torch.float64
    many = torch.stack([verts, 2 * verts, verts + 1])
    together = fast_to_world(splats, binding, many)
    assert together.means.shape == (3, 50, 3)
    assert together.scales.shape == (3, 50, 3)
    alone = fast_to_world(splats, binding, many[1], 'torch')
    for a, b in zip(together, alone):
        assert torch.allclose(a[1], b, atol=1e-6)
    with pytest.raises((TypeError, AttributeError)):
        fast_to_world(splats, binding, verts)  # and this is the fast way


@pytest.mark.parametrize(
    'wanted',
    [('offsets',), ('quats',), ('log_scales',), ('verts',), ('offsets', 'verts'), LOCAL],
    ids=' '.join,
)
def test_only_some_gradients(wanted):
    verts, binding, splats = scene(60)
    _, every = run(splats, binding, verts, 'numba')
    given = dict(splats, verts=verts)
    leaves = {k: t.clone().requires_grad_(k in wanted) for k, t in given.items()}
    out = fast_to_world(leaves, binding, leaves['verts'])
    g = seeded(5)
    torch.autograd.backward(out, [torch.randn(o.shape, generator=g) for o in out])
    for k, leaf in leaves.items():
        assert torch.equal(leaf.grad, every[k]) if k in wanted else leaf.grad is None


def gradients_of_one(i, splats, binding, verts, backend, dtype):
    "Gradients where only output i counts."
    leaves = leaves_of(dict(splats, verts=verts), dtype)
    weight = torch.linspace(-1, 1, len(binding), dtype=dtype)[:, None]
    out = fast_to_world(leaves, binding, leaves['verts'], backend)
    (out[i] * weight).sum().backward()
    return {k: torch.zeros_like(t) if t.grad is None else t.grad for k, t in leaves.items()}


@pytest.mark.parametrize('i', range(3), ids=('means', 'quats', 'scales'))
def test_each_output_alone(i):
    verts, binding, splats = scene(60)
    fast = gradients_of_one(i, splats, binding, verts, 'numba', torch.float32)
    agree(fast, gradients_of_one(i, splats, binding, verts, 'torch', torch.float64), 1e-5)


def test_frozen_mesh(monkeypatch):
    verts, binding, splats = scene(80)
    frames = fast_frames(binding, verts)
    assert not any(x.requires_grad for x in vars(frames).values())
    monkeypatch.setattr(kernels, 'place_backward_frames', None)
    monkeypatch.setattr(kernels, 'bind_backward', None)  # nobody asks for them
    fast, slow = leaves_of(splats), leaves_of(splats, torch.float64)
    sum((o**3).sum() for o in fast_place(fast, frames)).backward()
    sum((o**3).sum() for o in place(slow, bind_frames(binding, verts.double()))).backward()
    agree({k: t.grad for k, t in fast.items()}, {k: t.grad for k, t in slow.items()}, 1e-5)
    with torch.no_grad():
        assert not fast_place(fast, frames).means.requires_grad


def gradients_of_frames(frames, splats, backend, dtype):
    leaves = leaves_of(vars(frames), dtype)
    splats = {k: t.to(dtype) for k, t in splats.items()}
    world = fast_place(splats, TriangleFrames(**leaves), backend)
    sum((o**3).sum() for o in world).backward()
    return {k: t.grad for k, t in leaves.items()}


def test_place_answers_to_its_frames():
    "Also frames that are leaves, with quaternions pulled along their own direction."
    verts, binding, splats = scene(40)
    frames = fast_frames(binding, verts)
    fast = gradients_of_frames(frames, splats, 'numba', torch.float32)
    agree(fast, gradients_of_frames(frames, splats, 'torch', torch.float64), 1e-5)


def test_strides_do_not_matter():
    verts, binding, splats = scene(60)

    def loose(t):
        return torch.cat([t, t], -1).T.contiguous().T[:, : t.shape[-1]]

    assert not loose(verts).is_contiguous()
    world = fast_to_world({k: loose(t) for k, t in splats.items()}, binding, loose(verts))
    for a, b in zip(world, fast_to_world(splats, binding, verts)):
        assert torch.equal(a, b)


@pytest.mark.parametrize('backend', ('numba', 'torch'))
def test_a_nan_in_the_mesh_stays_with_its_own(backend):
    verts, binding, splats = scene(200)
    corner = binding.faces[3, 0]
    hurt = verts.clone()
    hurt[corner] = float('nan')
    touched = (binding.faces[binding.face_ids] == corner).any(-1)
    world = fast_to_world(splats, binding, hurt, backend)
    for x in world:
        assert x[~touched].isfinite().all()
    assert world.means[touched].isnan().all()


@pytest.mark.parametrize('backend', ('numba', 'torch'))
def test_a_nan_in_a_splat_stays_with_its_own(backend):
    verts, binding, splats = scene(200)
    bad = {k: t.clone() for k, t in splats.items()}
    bad['offsets'][7] = float('inf')
    bad['quats'][9] = float('nan')
    means, quats, _ = fast_to_world(bad, binding, verts, backend)
    assert not means[7].isfinite().any()
    assert quats[9].isnan().all()
    assert quats[:9].isfinite().all()
    assert means[8:].isfinite().all()


def test_an_input_changed_too_early_is_noticed():
    verts, binding, splats = scene(20)
    leaves = leaves_of(dict(splats, verts=verts))
    means, _, _ = fast_to_world(leaves, binding, leaves['verts'])
    with torch.no_grad():
        leaves['offsets'] += 1
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        means.sum().backward()


def bound(binding, **changes):
    "A binding of the same grid with other fields, never checked before."
    fields = {k: getattr(binding, k) for k in ('face_ids', 'bary', 'texels', 'faces')}
    return Binding(**(fields | changes), resolution=1)


def place_too_few(splats, binding, verts):
    few = dict(splats, offsets=splats['offsets'][:3])
    return fast_place(few, fast_frames(binding, verts), 'numba')


@pytest.mark.parametrize(
    'call,words',
    (
        (
            lambda s, b, v: fast_to_world(s, b, v, 'cuda'),
            "backend should be 'auto', 'torch' or 'numba'; got 'cuda'",
        ),
        (lambda s, b, v: fast_frames(b, v.double(), 'numba'), 'float64 on cpu'),
        (lambda s, b, v: fast_frames(b, v[None], 'numba'), "use backend='torch'"),
        (place_too_few, 'takes float32 CPU tensors of shapes'),
        (lambda s, b, v: fast_frames(b, v[:20]), 'verts should have at least 81 rows'),
        (
            lambda s, b, v: fast_frames(bound(b, face_ids=b.face_ids + 200), v),
            'face_ids should be from 0 to 127',
        ),
        (
            lambda s, b, v: fast_frames(bound(b, bary=b.bary[:9]), v),
            'bary should be .30,3., one row per face_id',
        ),
        (
            lambda s, b, v: fast_frames(bound(b, faces=b.faces - 1), v),
            'faces should hold vertex indices from 0; got -1',
        ),
    ),
)
def test_bad_input(call, words):
    verts, binding, splats = scene(30)
    with pytest.raises(InputError, match=words):
        call(splats, binding, verts)


def test_a_binding_cannot_be_rewired():
    _, binding, _ = scene(5)
    with pytest.raises(AttributeError):
        binding.faces = binding.faces.flip(0)
