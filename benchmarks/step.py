"""Where the time of a training step goes, and what the compiled loops save of it.

    python benchmarks/step.py [--threads 1,2] [--sizes M,L] [--repeats 7] [--out results/step.json]

M: 10,000 Gaussians on 256 x 256 pixels, L: 50,000 on 512 x 512. torch: the readable form of everything but the rasterizer (that one's
ladder is benchmarks/raster.py); fast: what the kit uses. One thread: its CPU time, best of several; two: wall time, so let the machine rest.
"""

import argparse

import torch
from common import SIZES, machine, save, scene, set_threads, thread_ms, wall_ms

from spatialavatar0.ground.core import set_seed
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.metrics import l1, ssim, ssim_map
from spatialavatar0.splats.binding import Binding, bind_uv, new_splats
from spatialavatar0.splats.kernels import fast_frames, fast_place
from spatialavatar0.splats.renderers import rasterize

LOCAL = ('offsets', 'quats', 'log_scales')


def bound(head, n):
    """Exactly n Gaussians on the head, from the coarsest UV grid that has so many: a binding and
    its splats."""
    R = next(R for R in range(int(n**0.5), 4 * int(n**0.5)) if len(bind_uv(head, R)) >= n)
    b = bind_uv(head, R)
    keep = torch.randperm(len(b), generator=torch.Generator().manual_seed(0))[:n].sort().values
    splats = new_splats(b, head, head()[0])
    return Binding(b.face_ids[keep], b.bary[keep], b.texels[keep], b.faces, R), {
        k: v[keep].clone().requires_grad_() for k, v in splats.items()
    }


def pull(outputs, inputs, weights):
    "Gradients of a weighted sum of the outputs."
    return torch.autograd.grad(
        [o for o in outputs if o.requires_grad],
        inputs,
        [w for o, w in zip(outputs, weights) if o.requires_grad],
    )


def pair(forward, inputs):
    """Two functions to time: forward without gradients, and forward with backward under fixed
    weights."""
    with torch.no_grad():
        weights = [torch.randn_like(o) for o in forward()]

    def alone():
        with torch.no_grad():
            forward()

    return alone, lambda: pull(forward(), inputs, weights)


def binding_parts(head, n):
    "name -> (torch, fast), each a pair of functions to time."
    b, s = bound(head, n)
    v = head()[0].clone().requires_grad_()
    frozen = fast_frames(b, v.detach())
    local = [s[k] for k in LOCAL]

    def fields(f):
        return (f.points, f.quats, f.scales)

    expr = torch.zeros(1, head.num_expr, requires_grad=True)
    frames = [pair(lambda e=e: fields(fast_frames(b, v, e)), [v]) for e in ('torch', 'numba')]
    placed = [pair(lambda e=e: fast_place(s, frozen, e), local) for e in ('torch', 'numba')]
    return {
        'mesh of the pose': (pair(lambda: (head(expr=expr),), [expr]),) * 2,
        'frames': frames,
        'binding': placed,
    }


def picture_parts(name):
    "The same for what works on pixels."
    x = scene(name)
    a = [x[k].requires_grad_() for k in ('means', 'quats', 'scales', 'opacities', 'colors')]
    n = x['width']
    draw = pair(lambda: rasterize(*a, x['viewmat'][None], x['K'][None], n, n)[:2], a)
    rgb = torch.rand(n, n, 3, requires_grad=True)
    truth = torch.rand(n, n, 3)
    planes = [t.detach().permute(2, 0, 1).contiguous() for t in (rgb, truth)]
    planes[0].requires_grad_()
    slow = pair(lambda: (ssim_map(*planes).mean(),), planes[:1])
    fast = pair(lambda: (ssim(rgb, truth),), [rgb])
    return {
        'rasterize': (None, draw),
        'SSIM': (slow, fast),
        'L1': (pair(lambda: (l1(rgb, truth),), [rgb]),) * 2,
    }


def adam(n, fused):
    "One step on all raw attributes."
    p = [torch.randn(n, k, requires_grad=True) for k in (3, 4, 3, 1, 3)]
    for x in p:
        x.grad = torch.randn_like(x)
    return torch.optim.Adam(p, lr=1e-3, fused=fused).step


def step(head, name, backend, moving):
    """A whole training step without the data: (mesh), frames, binding, picture, loss, backward,
    Adam."""
    n, size = SIZES[name]
    b, s = bound(head, n)
    view = scene(name)
    truth = torch.rand(size, size, 3)
    expr = torch.zeros(1, head.num_expr, requires_grad=True)
    K = view['K'].clone()
    V = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    V[2, 3] = 0.6
    K[0, 0] = K[1, 1] = 2.2 * size
    frozen = fast_frames(b, head()[0], backend)
    opt = torch.optim.Adam([*s.values(), *[expr] * moving], lr=1e-4, fused=backend != 'torch')
    similar = (
        (lambda a: ssim_map(a.permute(2, 0, 1), truth.permute(2, 0, 1)).mean())
        if backend == 'torch'
        else lambda a: ssim(a, truth)
    )

    def run():
        frames = fast_frames(b, head(expr=expr)[0], backend) if moving else frozen
        rgb = rasterize(
            *fast_place(s, frames, backend),
            s['logit_opacities'].sigmoid(),
            s['sh0'] * 0.28 + 0.5,
            V[None],
            K[None],
            size,
            size,
        )[0][0]
        opt.zero_grad()
        (0.8 * l1(rgb, truth) + 0.2 * (1 - similar(rgb))).backward()
        opt.step()

    return run


def table(name, head, ms):
    "part -> milliseconds of torch and fast, forward and both ways; printed as it comes."
    rows = {}

    def put(part, **t):
        rows[part] = t
        print(
            f'{part:20}'
            + ''.join(f'{t[k]:10.2f}' if t[k] is not None else f'{"-":>10}' for k in COLUMNS),
            flush=True,
        )

    for part, (slow, fast) in {
        **binding_parts(head, SIZES[name][0]),
        **picture_parts(name),
    }.items():
        a, b = [(None, None) if f is None else (ms(f[0]), ms(f[1])) for f in (slow, fast)]
        put(part, torch_forward=a[0], fast_forward=b[0], torch_both=a[1], fast_both=b[1])
    put(
        'Adam',
        torch_forward=None,
        fast_forward=None,
        torch_both=ms(adam(SIZES[name][0], False)),
        fast_both=ms(adam(SIZES[name][0], True)),
    )
    for moving in (False, True):
        put(
            'step, mesh ' + ('moving' if moving else 'frozen'),
            torch_forward=None,
            fast_forward=None,
            **{
                k + '_both': ms(step(head, name, b, moving))
                for k, b in (('torch', 'torch'), ('fast', 'auto'))
            },
        )
    return rows


COLUMNS = ('torch_forward', 'fast_forward', 'torch_both', 'fast_both')


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--threads', default='1')
    p.add_argument('--sizes', default='M,L')
    p.add_argument('--repeats', type=int, default=7)
    p.add_argument('--out', default='results/step.json')
    a = p.parse_args()
    set_seed(0)
    torch.set_flush_denormal(True)
    head = open_head()
    found = {}
    counts = [set_threads(int(t)) for t in a.threads.split(',')]
    for threads in counts:
        clock, kind = (thread_ms, 'CPU') if threads == 1 else (wall_ms, 'wall')
        set_threads(threads)
        found[f'{threads} thread{"s" * (threads > 1)}, {kind} time'] = sizes = {}
        for name in a.sizes.split(','):
            n, size = SIZES[name]
            print(
                f'\n{name}: {n:,} Gaussians, {size} x {size}; {threads} '
                f'thread{"s" * (threads > 1)}, milliseconds of {kind} time'
            )
            print(
                f'{"":20}'
                + ''.join(f'{c:>10}' for c in ('torch fwd', 'fast fwd', 'torch f+b', 'fast f+b'))
            )
            sizes[name] = table(name, head, lambda f: round(clock(f, a.repeats), 3))
    save(a.out, dict(machine=machine(), repeats=a.repeats, milliseconds=found))


if __name__ == '__main__':
    main()
