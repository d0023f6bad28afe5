"""Where the time of a training step goes, and what the compiled loops save of it.

    python benchmarks/step.py [--threads 1,2] [--sizes M,L] [--repeats 7] [--out results/step.json]

M: 10,000 Gaussians on 256 x 256 pixels, L: 50,000 on 512 x 512. torch: the readable form of
everything but the rasterizer (that one's ladder is benchmarks/raster.py); fast: what the kit uses.
One thread: its CPU time, best of several; two: wall time, so let the machine rest.
"""

import argparse

import torch
from common import SIZES, machine, save, scene, set_threads, thread_ms, wall_ms

from spatialavatar0.ground.core import set_seed
from spatialavatar0.ground.geometry import intrinsics
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.fast_metrics import ssim
from spatialavatar0.pictures.metrics import l1, ssim_map
from spatialavatar0.splats.binding import Binding, bind_uv, new_splats
from spatialavatar0.splats.kernels import fast_frames, fast_place
from spatialavatar0.splats.renderers import rasterize

LOCAL = ('offsets', 'quats', 'log_scales')
COLUMNS = ('torch_forward', 'fast_forward', 'torch_both', 'fast_both')


def coarsest(head, n):
    "The binding of the coarsest UV grid that has at least n Gaussians."
    sizes = range(int(n**0.5), 4 * int(n**0.5))
    return next(b for b in (bind_uv(head, size) for size in sizes) if len(b) >= n)


def bound(head, n):
    "Exactly n Gaussians on the head: a binding and its splats."
    whole = coarsest(head, n)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    keep = order[:n].sort().values
    splats = new_splats(whole, head, head()[0])
    kept = [x[keep] for x in (whole.face_ids, whole.bary, whole.texels)]
    binding = Binding(*kept, whole.faces, whole.resolution)
    return binding, {name: x[keep].clone().requires_grad_() for name, x in splats.items()}


def pull(outputs, inputs, weights):
    "Gradients of a weighted sum of the outputs."
    asked = [(x, weight) for x, weight in zip(outputs, weights) if x.requires_grad]
    outputs, weights = zip(*asked)
    return torch.autograd.grad(outputs, inputs, weights)


def pair(forward, inputs):
    """Two functions to time: forward without gradients, and forward with backward under fixed
    weights."""
    with torch.no_grad():
        weights = [torch.randn_like(x) for x in forward()]

    def alone():
        with torch.no_grad():
            forward()

    return alone, lambda: pull(forward(), inputs, weights)


def binding_parts(head, n):
    "name -> (torch, fast), each a pair of functions to time."
    binding, splats = bound(head, n)
    verts = head()[0].clone().requires_grad_()
    frozen = fast_frames(binding, verts.detach())
    local = [splats[name] for name in LOCAL]
    expr = torch.zeros(1, head.num_expr, requires_grad=True)

    def frames(backend):
        found = fast_frames(binding, verts, backend)
        return found.points, found.quats, found.scales

    both = 'torch', 'numba'
    mesh = pair(lambda: (head(expr=expr),), [expr])
    return {
        'mesh of the pose': (mesh, mesh),
        'frames': [pair(lambda b=b: frames(b), [verts]) for b in both],
        'binding': [pair(lambda b=b: fast_place(splats, frozen, b), local) for b in both],
    }


def picture_parts(name):
    "The same for what works on pixels."
    picture = scene(name)
    leaves = [x.requires_grad_() for x in picture.gaussians()]
    draw = pair(lambda: rasterize(*leaves, *picture.camera())[:2], leaves)
    size = picture.width
    rgb = torch.rand(size, size, 3, requires_grad=True)
    truth = torch.rand(size, size, 3)
    planes = [x.detach().permute(2, 0, 1).contiguous() for x in (rgb, truth)]
    planes[0].requires_grad_()
    slow = pair(lambda: (ssim_map(*planes).mean(),), planes[:1])
    fast = pair(lambda: (ssim(rgb, truth),), [rgb])
    absolute = pair(lambda: (l1(rgb, truth),), [rgb])
    return {'rasterize': (None, draw), 'SSIM': (slow, fast), 'L1': (absolute, absolute)}


def adam(n, fused):
    "One step on all raw attributes."
    raw = [torch.randn(n, width, requires_grad=True) for width in (3, 4, 3, 1, 3)]
    for x in raw:
        x.grad = torch.randn_like(x)
    return torch.optim.Adam(raw, lr=1e-3, fused=fused).step


def close_camera(size):
    "A camera .6 m in front of the head, for `rasterize`."
    viewmat = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    viewmat[2, 3] = 0.6
    return viewmat[None], intrinsics(2.2 * size, size, size)[None], size, size


def slow_ssim(a, b):
    return ssim_map(a.permute(2, 0, 1), b.permute(2, 0, 1)).mean()


def step(head, name, backend, moving):
    """A whole training step without the data: (mesh), frames, binding, picture, loss, backward,
    Adam."""
    n, size = SIZES[name]
    binding, splats = bound(head, n)
    camera = close_camera(size)
    truth = torch.rand(size, size, 3)
    expr = torch.zeros(1, head.num_expr, requires_grad=True)
    frozen = fast_frames(binding, head()[0], backend)
    is_fast = backend != 'torch'
    optimizer = torch.optim.Adam([*splats.values(), *[expr] * moving], lr=1e-4, fused=is_fast)
    similar = ssim if is_fast else slow_ssim

    def run():
        frames = fast_frames(binding, head(expr=expr)[0], backend) if moving else frozen
        opacities, colors = splats['logit_opacities'].sigmoid(), splats['sh0'] * 0.28 + 0.5
        placed = fast_place(splats, frames, backend)
        rgb = rasterize(*placed, opacities, colors, *camera).colors[0]
        optimizer.zero_grad()
        loss = 0.8 * l1(rgb, truth) + 0.2 * (1 - similar(rgb, truth))
        loss.backward()
        optimizer.step()

    return run


def timed(pairs, ms):
    "Milliseconds of torch and fast, forward and both ways."
    slow, fast = [(None, None) if p is None else (ms(p[0]), ms(p[1])) for p in pairs]
    return dict(
        torch_forward=slow[0],
        fast_forward=fast[0],
        torch_both=slow[1],
        fast_both=fast[1],
    )


def timed_steps(slow, fast, ms):
    "The same for what has no forward alone."
    return dict(torch_forward=None, fast_forward=None, torch_both=ms(slow), fast_both=ms(fast))


def table(name, head, ms):
    "part -> milliseconds of torch and fast, forward and both ways; printed as it comes."
    rows = {}

    def put(part, times):
        rows[part] = times
        cells = [f'{"-":>10}' if times[c] is None else f'{times[c]:10.2f}' for c in COLUMNS]
        print(f'{part:20}{"".join(cells)}', flush=True)

    n = SIZES[name][0]
    for part, pairs in {**binding_parts(head, n), **picture_parts(name)}.items():
        put(part, timed(pairs, ms))
    put('Adam', timed_steps(adam(n, False), adam(n, True), ms))
    for moving in (False, True):
        slow, fast = [step(head, name, backend, moving) for backend in ('torch', 'auto')]
        put(f'step, mesh {"moving" if moving else "frozen"}', timed_steps(slow, fast, ms))
    return rows


def tables(threads, sizes, repeats):
    "Milliseconds of every size with so many threads, and what they are called."
    clock, kind = (thread_ms, 'CPU') if threads == 1 else (wall_ms, 'wall')
    several = f'{threads} thread{"s" * (threads > 1)}'
    set_threads(threads)
    head, found = open_head(), {}
    for name in sizes:
        n, size = SIZES[name]
        print(f'\n{name}: {n:,} Gaussians, {size} x {size}; {several}, ', end='')
        print(f'milliseconds of {kind} time')
        headings = 'torch fwd', 'fast fwd', 'torch f+b', 'fast f+b'
        print(f'{"":20}' + ''.join(f'{heading:>10}' for heading in headings))
        found[name] = table(name, head, lambda f: round(clock(f, repeats), 3))
    return f'{several}, {kind} time', found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--threads', default='1')
    parser.add_argument('--sizes', default='M,L')
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--out', default='results/step.json')
    given = parser.parse_args()
    set_seed(0)
    torch.set_flush_denormal(True)
    counts = [set_threads(int(count)) for count in given.threads.split(',')]
    found = dict(tables(count, given.sizes.split(','), given.repeats) for count in counts)
    save(given.out, dict(machine=machine(), repeats=given.repeats, milliseconds=found))


if __name__ == '__main__':
    main()
