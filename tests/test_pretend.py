"""The CUDA path on a machine without CUDA (tests/pretend.py): every tensor on the device it should
be on, the same numbers as on the CPU, and the host hardly ever waiting."""

import json
import os
import signal
import threading
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import product
from types import SimpleNamespace

import gsplat
import house
import numpy as np
import pytest
import torch
from conftest import ROOT
from pretend import pretend_cuda

from spatialavatar0 import cli, pipeline
from spatialavatar0.avatar.avatar import load_avatar
from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.capture.film_avatar import first_film_avatar, refine_on_film
from spatialavatar0.capture.photo import front_psnr, refine_photo
from spatialavatar0.cli import doctor
from spatialavatar0.ground import core
from spatialavatar0.ground.core import InputError, is_on, send, set_seed
from spatialavatar0.judge.benchmark import Job, jobs_of, run_job
from spatialavatar0.judge.evaluate import renderer
from spatialavatar0.judge.results import evaluate
from spatialavatar0.pictures.clips import Clip, write_vhap
from spatialavatar0.pictures.domains import Trial, multi, people
from spatialavatar0.pictures.fast_metrics import _Lpips, open_lpips
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.pipeline import (
    BuildConfig,
    MotionOptions,
    Tracked,
    animate_avatar,
    contact_sheet,
    export_avatar,
    turned_error,
)
from spatialavatar0.splats.renderers import missing_for_gsplat, rasterize, receipt
from spatialavatar0.stage1.generator import from_preset, preset
from spatialavatar0.stage1.objective import Weights
from spatialavatar0.stage1.schedule import MonoPhase, MultiPhase
from spatialavatar0.stage1.trainer import Shelf, Trainer, score_generator
from spatialavatar0.stage2.densify import Densification, DensifyConfig
from spatialavatar0.stage2.loop import Refinement, _thrown, look, measure, refine
from spatialavatar0.stage2.refine import RefineConfig, fast_config, light_share, paper_config
from spatialavatar0.use.animate import pose_of
from spatialavatar0.use.export import read_splats
from spatialavatar0.use.viewer import SHOW, Explorer, panel_picture, viser_splats


@pytest.fixture
def gpu():
    with pretend_cuda() as there:
        yield there


# ----------------------------------------------------------------------------- the rules of CUDA


def test_devices_do_not_mix(gpu):
    there, here = torch.ones(3, device='cuda'), torch.ones(3)
    with pytest.raises(RuntimeError, match='on the same device'):
        there + here
    with pytest.raises(RuntimeError, match='on the same device'):
        there[:2] = here[:2] * torch.ones(2, device='cuda')
    assert (there + here.sum()).sum().item() == 12  # a number may come along


def test_numpy_is_refused(gpu):
    with pytest.raises(TypeError, match='Tensor.cpu'):
        torch.ones(3, device='cuda').numpy()
    assert torch.ones(3, device='cuda').cpu().numpy().sum() == 3


def test_indices_come_from_either_side(gpu):
    there, here = torch.arange(3, device='cuda'), torch.arange(3)
    assert there[here].sum().item() == 3
    with pytest.raises(RuntimeError, match='indices should be'):
        here[there]


def test_generators_of_the_other_side(gpu):
    with pytest.raises(RuntimeError, match='for generator'):
        torch.rand(3, device='cuda', generator=torch.Generator())


def test_waits_are_counted_by_place(gpu):
    x = torch.ones(3, device='cuda')
    with gpu.watch() as seen:
        x.sum().item()
        x.nonzero()
        x[x > 0]
        torch.ones(3).to('cuda')
        send(torch.ones(3), 'cuda')
    kinds = sorted(kind for kind, _ in seen.waits)
    assert kinds == ['item', 'mask', 'nonzero', 'to the GPU']
    assert all('test_waits_are_counted' in place for _, place in seen.waits)


def test_gradients_and_optimisers(gpu):
    x = torch.ones(3, device='cuda').requires_grad_()
    adam = torch.optim.Adam([x], lr=0.5, fused=True)
    (x**2).sum().backward()
    adam.step()
    assert x.is_cuda and x.grad.is_cuda
    assert torch.allclose(x.detach().cpu(), torch.full((3,), 0.5), atol=1e-4)


def test_autocast(gpu):
    x = torch.ones(2, 2, device='cuda')
    with torch.autocast('cuda', torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        assert (x @ x).softmax(0).dtype == torch.float32
        assert torch.cat([x @ x, x]).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def gaussians(device, dtype=torch.float32):
    set_seed(0)
    n = 5
    means = torch.randn(n, 3) * 0.1 + torch.tensor([0, 0, 1.0])
    world = means, torch.randn(n, 4), torch.full((n, 3), 0.05), torch.rand(n), torch.rand(n, 3)
    K = torch.tensor([[[16.0, 0, 8], [0, 16, 8], [0, 0, 1]]])
    camera = torch.eye(4)[None], K
    return [x.to(device, dtype) for x in (*world, *camera)]


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_gsplat_takes_float32_alone(gpu, dtype):
    with pytest.raises(RuntimeError, match='expected scalar type Float'):
        gsplat.rasterization(*gaussians('cuda', dtype), 16, 16)


def test_gsplat_takes_no_host_tensors(gpu):
    with pytest.raises(RuntimeError, match='must be a CUDA tensor'):
        gsplat.rasterization(*gaussians('cpu'), 16, 16)
    with pytest.raises(TypeError, match='unexpected keyword'):
        gsplat.rasterization(*gaussians('cuda'), 16, 16, max_alpha=0.9)


def test_the_same_picture_and_a_receipt_for_it(gpu):
    with receipt() as rendered:
        here = rasterize(*gaussians('cpu'), 16, 16).colors
        there = rasterize(*gaussians('cuda'), 16, 16).colors
    assert torch.equal(here, there.cpu())
    assert rendered == {('cpu', 'cpu'): 1, ('gsplat', 'cuda:0'): 1}


def test_nothing_of_it_stays():
    before = torch.cuda.is_available, torch.Tensor.to, torch.tensor, gsplat.rasterization
    with pretend_cuda():
        assert torch.cuda.is_available()
    assert before == (torch.cuda.is_available, torch.Tensor.to, torch.tensor, gsplat.rasterization)
    assert type(torch.ones(1)) is torch.Tensor


# ------------------------------------------------------------------------------------ Stage 1

FEW = Weights(ms_ssim=0.0, ssim=1.0, lpips=0.0, residual=1e-2)


@pytest.fixture(scope='module')
def tiny():
    return from_preset('tiny')


@pytest.fixture(scope='module')
def film():
    return mono_clip(make_person(3, resolution=64), 8, 64, seed=1)


@pytest.fixture(scope='module')
def shelf(tiny, film):
    return Shelf([film, film], tiny)


@pytest.fixture(scope='module')
def studio(tiny):
    return Shelf(people(multi(64, instants=5, cameras=5), 1, seed=1), tiny)


def trainer_on(device, data, phase=MonoPhase, weights=FEW, **changes):
    how = {k: changes.pop(k) for k in ('bf16', 'accumulate', 'batch') if k in changes}
    generator = from_preset('tiny', **changes).to(device)
    return Trainer(generator, [phase(4, how.pop('batch', 2), 1e-4, weights, **how)], [data], seed=1)


PARTS = dict(
    phase=(MonoPhase, MultiPhase),
    pool=('visible', 'plain', 'attention'),
    residual=(True, False),
    jacobian=(0.0, 0.1),
)


@pytest.mark.parametrize('phase, pool, residual, jacobian', list(product(*PARTS.values())))
def test_a_training_step(gpu, shelf, studio, phase, pool, residual, jacobian):
    data = shelf if phase is MonoPhase else studio
    weights = replace(FEW, jacobian=jacobian, l2sp=1e-3 * (phase is MultiPhase))
    how = dict(phase=phase, weights=weights, pool=pool, residual=residual)
    here, there = (trainer_on(device, data, **how).step() for device in ('cpu', 'cuda'))
    assert here.keys() == there.keys()
    for name, cost in here.items():
        assert there[name] == pytest.approx(cost, rel=1e-3, abs=1e-5), name


SWITCHES = 'pool', 'shells', 'mirror', 'visibility', 'bypass', 'teeth'


@pytest.mark.parametrize('name', ['paper', 'ours'])
def test_the_papers_network(gpu, name):
    "Small; batches drawn ahead, activations computed again."
    switches = {switch: getattr(preset(name), switch) for switch in SWITCHES}
    weights = replace(FEW, jacobian=0.1, l2sp=1e-3)
    costs = []
    for device in PLACES:
        generator = from_preset('tiny', **switches).to(device)
        generator.recompute = 2
        phase = MultiPhase(4, 2, 1e-4, weights, weight_decay=0.01)
        clip = people(multi(64, instants=5, cameras=5), 1, seed=1)
        trainer = Trainer(generator, [phase], [clip], seed=1, ahead=2)
        costs.append(trainer.step() | trainer.step())
    for term, cost in costs[0].items():
        assert costs[1][term] == pytest.approx(cost, rel=1e-3, abs=1e-5), term


@pytest.mark.parametrize('pool', PARTS['pool'])
def test_a_training_step_in_half_precision(gpu, shelf, pool):
    how = dict(pool=pool, weights=replace(FEW, jacobian=0.1))
    whole = trainer_on('cuda', shelf, **how).step()
    half = trainer_on('cuda', shelf, bf16=True, **how).step()
    assert half['l1'] == pytest.approx(whole['l1'], rel=0.05)
    assert half['l1'] != whole['l1']


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(gpu, shelf, device):
    weights = replace(FEW, jacobian=0.1)
    trainer = trainer_on(device, shelf, weights=weights, batch=4)
    batch = trainer.draw()

    def gradient(parts):
        costs, each = trainer.backward(batch, weights, parts=parts)
        grads = [p.grad.flatten() for p in trainer.params if p.grad is not None]
        return costs, len(each), torch.cat(grads).cpu()

    costs, count, whole = gradient(1)
    for parts in (2, 4):
        again, same, sum_of_parts = gradient(parts)
        assert again == pytest.approx(costs, rel=1e-5) and same == count == 4
        assert (sum_of_parts - whole).norm() <= 1e-5 * whole.norm()


def test_a_batch_that_cannot_be_cut(shelf):
    trainer = trainer_on('cpu', shelf, batch=4)
    with pytest.raises(InputError, match='a batch of 4 has no 3 equal parts'):
        trainer.backward(trainer.draw(), FEW, parts=3)
    with pytest.raises(InputError, match='1 processes in 3 parts each; make it a multiple'):
        trainer_on('cpu', shelf, batch=4, accumulate=3).draw()


def weights_of(trainer):
    return torch.cat([p.detach().cpu().flatten() for p in trainer.params])


@pytest.mark.parametrize('first, then', [('cpu', 'cuda'), ('cuda', 'cpu')])
def test_training_goes_on_across_devices(gpu, shelf, tmp_path, first, then):
    begun = trainer_on(first, shelf)
    begun.run(2, tmp_path / 'state.safetensors', show=False)
    moved = trainer_on(then, shelf)
    moved.load(tmp_path / 'state.safetensors')
    assert torch.equal(weights_of(begun), weights_of(moved))
    before = weights_of(begun)
    costs = begun.step(), moved.step()
    assert costs[1] == pytest.approx(costs[0], rel=1e-3, abs=1e-5)
    apart = weights_of(begun) - weights_of(moved)
    assert apart.norm() < 0.05 * (weights_of(begun) - before).norm()


def test_two_processes(gpu, shelf):
    trainer = trainer_on('cuda', shelf)
    other = trainer_on('cuda', shelf)
    for rank, who in enumerate((trainer, other)):
        who.rank, who.world = rank, 2
        who.accelerator = SimpleNamespace(reduce=lambda grads, how: grads / 2)
    shares = trainer.draw(), other.draw()
    assert [len(share) for share in shares] == [1, 1] and shares[0].names != shares[1].names
    costs, _ = trainer.backward(shares[0], FEW)
    assert costs['l1'] > 0 and all(p.grad is None or p.grad.is_cuda for p in trainer.params)


def test_a_generator_is_judged_and_makes_an_avatar(gpu, tiny, film):
    trials = [Trial(film[:2], film[5], 0)]
    here, there = (score_generator(from_preset('tiny').to(d), trials, 2) for d in PLACES)
    assert there == pytest.approx(here, rel=1e-3)
    avatar = from_preset('tiny').to('cuda')(film[:2])
    assert all(is_on(x, 'cpu') for x in avatar.splats.values())


def test_memory_that_is_not_there(shelf, monkeypatch):
    trainer = trainer_on('cpu', shelf)
    before = trainer.rng.get_state()

    def full(*_):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')

    monkeypatch.setattr(trainer.generator, 'encode', full)
    with pytest.raises(InputError, match='batch of 2 in one part.*--accumulate 2'):
        trainer.step()
    assert torch.equal(before, trainer.rng.get_state())


# ------------------------------------------------------------------------------------ Stage 2


@pytest.fixture(scope='module')
def start(film):
    return from_frame(film[0], 32)


PLACES = 'cpu', 'cuda'
GUARDED = dict(freeze=2, aspect_from=2)
CONFIGS = dict(
    paper=paper_config(**GUARDED),
    ours=RefineConfig(**GUARDED),
    fast=fast_config(**GUARDED),
)


@pytest.mark.parametrize('config', CONFIGS)
def test_refinement(gpu, start, film, config):
    how = dict(config=CONFIGS[config], seed=0)
    here, _ = refine(start, film[:6], 8, **how)
    there, _ = refine(start, film[:6], 8, device='cuda', **how)
    assert all(is_on(x, 'cpu') for x in there.splats.values())
    psnrs = [measure(avatar, film[6:])['psnr'] for avatar in (here, there)]
    assert psnrs[1] == pytest.approx(psnrs[0], abs=0.05)


@pytest.mark.parametrize('first, then', [('cpu', 'cuda'), ('cuda', 'cpu')])
def test_refinement_goes_on_across_devices(gpu, start, film, tmp_path, first, then):
    begun = Refinement(start, film[:6], CONFIGS['ours'], 8, device=first)
    for _ in range(4):
        begun.step()
    begun.save(tmp_path / 'state.safetensors')
    moved = Refinement(start, film[:6], CONFIGS['ours'], 8, device=then)
    moved.load(tmp_path / 'state.safetensors')
    for name in begun.delta:
        assert torch.equal(begun.delta[name].detach().cpu(), moved.delta[name].detach().cpu())
    for run in (begun, moved):
        run.step()
    assert float(moved.cost) == pytest.approx(float(begun.cost), rel=1e-3)


def test_an_avatar_moves(gpu, start, film, tmp_path):
    there = start.to('cuda')
    assert there.to('cuda') is there and there.to('cuda:0') is there
    frame = film[0]
    camera = frame.viewmat, frame.K, frame.width, frame.height
    pictures = [a.render(*camera, background=1.0, **frame.pose)[0] for a in (start, there)]
    assert pictures[1].is_cuda
    assert torch.allclose(pictures[0], pictures[1].cpu(), atol=1e-4)
    there.save(tmp_path / 'there.safetensors')
    assert torch.equal(
        load_avatar(tmp_path / 'there.safetensors').splats['sh0'], start.splats['sh0']
    )
    assert measure(there, film[:2]) == pytest.approx(measure(start, film[:2]), rel=1e-3)
    shares = light_share(start, film[:2]), light_share(there, film[:2])
    assert shares[1].is_cuda and torch.allclose(shares[0], shares[1].cpu(), atol=1e-3)


def test_growing_and_pruning(gpu, start, film):
    cfg = DensifyConfig(begin=0.2, every=0.1, reset=0.5)
    counts = []
    for device in ('cpu', 'cuda'):
        run = Densification(start, film[:6], cfg, 20, device=device)
        for _ in range(12):
            run.step()
        counts.append(run.row()['count'])
    assert counts[1] == pytest.approx(counts[0], rel=0.05)


def test_an_evaluation_says_where_it_was_rendered(gpu, start, film):
    lines = []
    for device in ('cpu', 'cuda'):
        avatar = start.to(device)
        names = dict(method='warp', subject='nobody')
        lines.append(evaluate(renderer(avatar), film[5:], 'splattingavatar', **names, lpips=None))
    assert [line.device.split(' ')[0] for line in lines] == ['cpu', 'cuda']
    assert [line.rendered for line in lines] == [dict(cpu=3), dict(gsplat=3)]
    assert lines[1].scores['psnr'] == pytest.approx(lines[0].scores['psnr'], abs=1e-2)


def test_pictures_stay_where_there_is_room(gpu, start, film):
    rooms = [Refinement(start, film[:2], CONFIGS['paper'], 8, device=d).room for d in PLACES]
    assert rooms == [256e6, 35 * gpu.GIB]  # half of what is free


def test_refinement_without_memory(start, film, monkeypatch, tmp_path):
    run = Refinement(start, film[:6], CONFIGS['paper'], 8)

    def full(*_):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')

    monkeypatch.setattr(run, 'loss', full)
    with pytest.raises(InputError, match='no memory on the GPU for [0-9,]+ Gaussians.*fewer'):
        run.go(state=tmp_path / 'state.safetensors')
    assert (tmp_path / 'state.safetensors').exists()


# ------------------------------------------------------------------------- photos, films, commands


@pytest.fixture(scope='module')
def built(film):
    "An avatar of a few frames of a film, and the votes of their mattes."
    return first_film_avatar(film[:4], 32, n=2, outlines=4)


def test_a_photo_is_refined(gpu, start, film):
    with receipt() as rendered:
        here, there = (refine_photo(start, film[0], 6, device=d)[0] for d in PLACES)
    assert rendered['gsplat', 'cuda:0'] == 6
    assert all(is_on(x, 'cpu') for x in there.splats.values())
    assert front_psnr(there, film[0]) == pytest.approx(front_psnr(here, film[0]), abs=0.05)


def test_a_film_is_refined(gpu, built, film):
    with receipt() as rendered:
        here, there = (refine_on_film(*built, film[:4], 6, device=d)[0] for d in PLACES)
    assert rendered['gsplat', 'cuda:0'] == 4 + 6  # light_share's, then the steps
    assert front_psnr(there, film[0]) == pytest.approx(front_psnr(here, film[0]), abs=0.05)


@pytest.mark.parametrize('kind', ['frames', 'views'])
def test_light_is_shared_on_the_device(gpu, start, film, kind):
    clip = Clip([look(start, frame) for frame in film]) if kind == 'views' else film
    here, there = light_share(start, clip), start.to('cuda')
    with gpu.watch() as seen, receipt() as rendered:
        share = light_share(there, clip)
    assert rendered == {('gsplat', 'cuda:0'): len(clip)} and share.is_cuda
    assert not seen.waits or kind == 'frames', seen.waits
    assert torch.allclose(here, share.cpu(), rtol=1e-5, atol=1e-5)


def test_lpips_judges_on_the_host(gpu, start, film):
    lpips = open_lpips() or random_lpips()
    names = dict(method='warp', subject='nobody', lpips=lpips)
    lines = [
        evaluate(renderer(start.to(device)), film[6:], 'splattingavatar', **names)
        for device in PLACES
    ]
    assert [line.rendered for line in lines] == [dict(cpu=2), dict(gsplat=2)]
    assert lines[1].scores['lpips'] == pytest.approx(lines[0].scores['lpips'], abs=1e-4)


def random_lpips():
    "The shape of LPIPS where its weights are not here."
    net = pytest.importorskip('lpips').LPIPS(net='alex', pnet_rand=True, verbose=False)
    return _Lpips(net.eval().requires_grad_(False), 'random')


@pytest.fixture(scope='module')
def folder(film, tmp_path_factory):
    return write_vhap(film, tmp_path_factory.mktemp('people') / 'somebody')


def test_a_job_of_a_benchmark(gpu, folder):
    job = Job('somebody', 'somebody', folder, folder, 'warp+ours', 'last:2', iters=4, resolution=32)
    here, there = (run_job(replace(job, device=device)) for device in PLACES)
    assert (here.rendered, there.rendered) == (dict(cpu=2), dict(gsplat=2))
    assert there.scores['psnr'] == pytest.approx(here.scores['psnr'], abs=0.05)


# --------------------------------------------------------------------- an avatar that lies on a GPU

FILES = '.ply .compressed.ply .splat .npz'.split()


@pytest.mark.parametrize('ending', FILES)
def test_splats_are_written_from_a_gpu(gpu, start, tmp_path, ending):
    files = [tmp_path / f'{device}{ending}' for device in PLACES]
    for device, file in zip(PLACES, files):
        export_avatar(start.to(device), file)
    here, there = map(read_splats, files)
    close = dict(atol=0.02 if ending in ('.compressed.ply', '.splat') else 1e-5)
    assert torch.allclose(here[0], there[0], **close) and torch.allclose(here[4], there[4], **close)


@pytest.mark.parametrize('name', ['head.glb', 'head.html'])
def test_a_mesh_and_a_page_are_written_from_a_gpu(gpu, start, tmp_path, name):
    files = [tmp_path / device / name for device in PLACES]
    for device, file in zip(PLACES, files):
        export_avatar(start.to(device), file)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize('theirs', [False, True])
def test_a_motion_is_written_from_a_gpu(gpu, start, tmp_path, theirs):
    folders = [tmp_path / device for device in PLACES]
    options = MotionOptions(0.08)
    for device, folder in zip(PLACES, folders):
        export_avatar(start.to(device), folder, 'nod', gaussian_avatars=theirs, options=options)
    here, there = (sorted(path.name for path in folder.iterdir()) for folder in folders)
    assert here == there and len(here) >= 2
    if theirs:
        assert all((folders[0] / n).read_bytes() == (folders[1] / n).read_bytes() for n in here)


def test_an_avatar_is_filmed_on_a_gpu(gpu, start, tmp_path):
    with receipt() as rendered:
        animate_avatar(
            start.to('cuda'), 'talk', tmp_path / 'a.mp4', size=32, options=MotionOptions(0.12)
        )
    assert rendered == {('gsplat', 'cuda:0'): 3}
    assert (tmp_path / 'a.mp4').stat().st_size > 500


def test_a_head_without_names_is_posed_on_a_gpu(gpu):
    head = SimpleNamespace(num_expr=3, template=torch.zeros(4, 3, device='cuda'))
    pose = pose_of(head, dict(expr1=0.5, jawPitch=10, eyesYaw=5))
    assert all(x.is_cuda for x in pose.values()) and pose['expr'].cpu()[0, 1] == 0.5


@pytest.mark.parametrize('show', SHOW)
def test_the_panel_shows_an_avatar_on_a_gpu(gpu, start, show):
    values = dict(jawOpen=0.3, yaw=10)
    here, there = (panel_picture(start.to(device), values, 32, 32, show) for device in PLACES)
    assert there.is_cuda == (show != 'mesh')
    assert torch.allclose(here, there.cpu(), atol=1e-3)


def test_the_viewer_shows_an_avatar_on_a_gpu(gpu, start):
    here, there = (viser_splats(start.to(device), dict(jawOpen=0.3)) for device in PLACES)
    for name, numbers in here.items():
        assert np.allclose(numbers, there[name], atol=1e-4), name
    explorer = Explorer(start.to('cuda'), 32)
    assert bytes(explorer.image.value[:2]) == b'\xff\xd8'  # a JPEG


def test_the_sheet_of_an_avatar_on_a_gpu(gpu, start, film):
    here, there = (contact_sheet(start.to(device), film[0], 32) for device in PLACES)
    for (title, one), (_, other) in zip(here, there):
        assert torch.allclose(one.cpu(), other.cpu(), atol=5e-3), title
    turned = [turned_error(start.to(device), film[0], 0, 64) for device in PLACES]
    assert turned[0] is None or turned[1] == pytest.approx(turned[0], abs=0.5)


# ------------------------------------------------------------------------- commands with --device


def command(*words):
    "Run a command of the terminal; a user's mistake is raised."
    cli.app([str(word) for word in words], standalone_mode=False)


@pytest.fixture
def painted(monkeypatch, film):
    "Tracking gives a painted person, and no films are written."
    tracked = Tracked([film[0]], ['photo.png'], dict(landmarks=dict(mean=1.0)))
    small = BuildConfig(size=64, resolution=32, iters=3, film=32, clip_iters=3)
    monkeypatch.setattr(pipeline, 'build_preset', lambda _, s, d: replace(small, seed=s, device=d))
    monkeypatch.setattr(pipeline, 'track_photos', lambda *_: tracked)
    monkeypatch.setattr(pipeline, 'track_clip', lambda *_, **__: film)
    monkeypatch.setattr(pipeline, '_begin_film', lambda *_: None)
    monkeypatch.setattr(pipeline, '_tracking_numbers', lambda *_: {})
    monkeypatch.setattr(pipeline, 'write_results', lambda *_: None)
    monkeypatch.setattr(pipeline, 'judge_turns', lambda *_: {})
    monkeypatch.setattr(pipeline, '_painted_scores', lambda *_: {})
    monkeypatch.setattr(pipeline, 'first_film_avatar', partial(first_film_avatar, n=2, outlines=3))


def build_photo(folder, out):
    photo = next(iter(folder.rglob('*.png')))
    command('build', photo, '--out', out, '--device', 'cuda')


def build_film(folder, out):
    command('build', 'film.mp4', '--out', out, '--device', 'cuda')


def run_demo(folder, out):
    command('demo', '--out', out, '--device', 'cuda')


def run_refine(folder, out):
    how = '--iters', 2, '--resolution', 32, '--out', out
    command('refine', 'new', folder, *how, '--device', 'cuda')


def run_train(folder, out):
    how = '--preset', 'tiny', '--steps', 5, '--people', 2, '--subjects', 1, '--batch', 1
    command('train', *how, '--out', out, '--device', 'cuda')


def run_evaluate(folder, out):
    how = '--protocol', 'last:2', '--out', out / 'lines.jsonl'
    command('evaluate', 'warp', folder, *how, '--device', 'cuda')


def run_benchmark(folder, out):  # the command starts processes, which cannot pretend
    run_job(jobs_of(folder.parent, 'last:2', 'warp', resolution=32, device='cuda')[0])


RUNS = dict(
    demo=[run_demo],
    build=[build_photo, build_film],
    refine=[run_refine],
    train=[run_train],
    evaluate=[run_evaluate],
    benchmark=[run_benchmark],
)
REFUSES = dict(
    track=['film.mp4'],
    view=['a.safetensors'],
    animate=['a.safetensors'],
    export=['a.safetensors', 'a.ply'],
)


def test_every_command_with_a_device_is_here():
    from typer.main import get_command

    commands = get_command(cli.app).commands.items()
    with_device = [k for k, c in commands if any(p.name == 'device' for p in c.params)]
    assert sorted(with_device) == sorted([*RUNS, *REFUSES])


@pytest.mark.parametrize('run', [run for runs in RUNS.values() for run in runs])
def test_a_command_uses_the_gpu(gpu, painted, folder, tmp_path, run):
    with receipt() as rendered:
        run(folder, tmp_path / 'out')
    assert rendered['gsplat', 'cuda:0'] > 0


@pytest.mark.parametrize('name', REFUSES)
def test_a_command_refuses_the_gpu(gpu, name):
    with pytest.raises(InputError, match='nothing for a GPU to do; use --device cpu'):
        command(name, *REFUSES[name], '--device', 'cuda')


# ----------------------------------------------------------------------------- the host's waiting


def test_refinement_hardly_waits(gpu, start, film):
    for config in CONFIGS.values():
        run = Refinement(start, film[:6], config, 12, device='cuda')
        for i in range(6):
            run.view(i)
        for _ in range(4):
            run.step()
        with gpu.watch() as seen:
            run.step()
        assert sum(seen.gsplat.values()) == 1  # which waits once by itself
        assert sum(seen.waits.values()) + 1 <= 2, seen.waits


def test_training_hardly_waits(gpu, shelf):
    trainer = trainer_on('cuda', shelf, weights=replace(FEW, jacobian=0.1, l2sp=1e-3), bf16=True)
    trainer.step()
    with gpu.watch() as seen:
        trainer.step()
    assert sum(seen.waits.values()) <= 2, seen.waits
    assert sum(seen.gsplat.values()) == 2  # one per picture, each waits once by itself


# -------------------------------------------------------------------- the next pictures, made ahead


def slow_room(film, start, iters=12, ahead=3, device='cpu', kept=1, **how):
    "A refinement that has room for so many views."
    run = Refinement(start, film, CONFIGS['ours'], iters, ahead=ahead, device=device, **how)
    run.room = kept * look(start, film[0]).bytes() - 1
    return run


def watched(film, looked):
    "A clip that notes which thread asks for which frame."

    def frame(i):
        looked.append((threading.current_thread().name.split('_')[0], i))
        return film[i]

    return Clip(frame, len(film), leaf=Clip(film).leaf)


def same(one, other):
    return all(torch.equal(one.splats[name], other.splats[name]) for name in one.splats)


@pytest.mark.parametrize('ahead', [1, 3, 50])
def test_a_thread_changes_nothing(start, film, ahead):
    view = look(start, film[0])
    for how in (dict(), dict(extra=[view])):
        looked = []
        alone, _ = slow_room(film, start, ahead=0, **how).go()
        run = slow_room(watched(film, looked), start, ahead=ahead, **how)
        helped, log = run.go()
        assert same(alone, helped) and len(log) == 2
        helpers = [i for name, i in looked if name == 'look ahead']
        dice, wanted = torch.Generator().manual_seed(0), []
        for step in range(12):
            i, _ = _thrown(dice, len(film))
            wanted += [i] * (i != 0 and not (how and step % 4 == 3))  # view 0 is kept
        assert helpers == wanted[-len(helpers) :] and len(helpers) >= len(wanted) - 1 > 3
    assert not [t for t in threading.enumerate() if t.name.startswith('look ahead')]


def test_a_thread_on_the_gpu(gpu, start, film):
    looked = []
    alone, _ = slow_room(film, start, ahead=0, device='cuda').go()
    run = slow_room(watched(film, looked), start, ahead=None, device='cuda')
    helped, _ = run.go()
    assert same(alone, helped)
    assert [name for name, _ in looked].count('look ahead') > 5


def test_a_clip_that_fits_needs_no_thread(start, film):
    looked = []
    slow_room(watched(film, looked), start, kept=99).go()
    assert {name for name, _ in looked} == {'MainThread'}


def test_steps_hardly_wait_with_a_thread(gpu, start, film):
    run = slow_room(film, start, iters=30, ahead=4, device='cuda', kept=0)
    with run._looking_ahead():
        for _ in range(4):
            run.step()
        with gpu.watch() as seen:
            for _ in range(8):
                run.step()
    assert run.looker is None
    assert sum(seen.gsplat.values()) == 8
    assert sum(seen.waits.values()) + 8 <= 2 * 8, seen.waits


@pytest.mark.parametrize('place', ['the thread', 'the step'])
def test_an_error_is_the_same_from_a_thread(start, film, tmp_path, place):
    frames = [film[i] for i in range(len(film))]
    frames[5] = replace(frames[5], image=frames[5].image * float('nan'))
    bad = Clip(frames)
    said, states, results = [], [], []
    for ahead in (0, 3):
        run = slow_room(bad, start, iters=60, ahead=ahead)
        run.cfg = replace(run.cfg, keep=0.0)
        state = tmp_path / f'{ahead}.safetensors'
        if place == 'the step':
            frames[5], step = film[5], run.loss

            def fail(*args, step=step, run=run):
                if run.step_number == 7:
                    raise InputError('no such step')
                return step(*args)

            run.loss = fail
        with pytest.raises(InputError) as refused:
            run.go(state=state)
        said.append(str(refused.value))
        states.append((run.step_number, run.rng.get_state().tolist()))
        results.append(run.result())
        assert state.exists()
    assert said[0] == said[1] and states[0] == states[1] and same(*results)
    assert 'no such step' in said[0] or 'the image of frame 5 holds nan' in said[0]
    assert not [t for t in threading.enumerate() if t.name.startswith('look ahead')]


def test_ctrl_c_and_going_on_with_a_thread(start, film, tmp_path):
    whole, _ = slow_room(film, start, iters=20, ahead=0).go()
    state = tmp_path / 'state.safetensors'

    def stop(step, avatar):
        os.kill(os.getpid(), signal.SIGINT)

    run = slow_room(film, start, iters=20)
    run.go(callback=stop, state=state)
    assert run.flag and 0 < run.step_number < 20
    assert not [t for t in threading.enumerate() if t.name.startswith('look ahead')]
    again = slow_room(film, start, iters=20)
    again.go_on_from(state)
    assert 0 < again.step_number < 20
    helped, _ = again.go()
    assert same(whole, helped)


def test_other_random_numbers_are_met_by_the_thread(start, film):
    "Whoever changes the run between two steps gets the picture that is asked for."
    runs = [slow_room(film, start, iters=30, ahead=ahead, kept=0) for ahead in (0, 4)]
    for run in runs:
        with run._looking_ahead():
            for step in range(12):
                if step == 7:
                    run.rng.manual_seed(11)
                run.step()
    assert same(runs[0].result(), runs[1].result())


# --------------------------------------------------------------------------------- what is missing


def test_gsplat_that_was_not_compiled(gpu, monkeypatch):
    monkeypatch.setattr(gsplat.cuda._backend, '_C', None)
    monkeypatch.setenv('PATH', '/nowhere')
    monkeypatch.setenv('CUDA_HOME', '/nowhere')
    assert 'nvcc is missing' in missing_for_gsplat() and 'ninja is missing' in missing_for_gsplat()
    with pytest.raises(InputError, match='could not be compiled: nvcc is missing.*backend="cpu"'):
        rasterize(*gaussians('cuda'), 16, 16)


def test_doctor_says_what_gsplat_lacks(gpu, monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    monkeypatch.setenv('CUDA_HOME', '/nowhere')
    (row,) = [row for row in doctor() if row[0] == 'gsplat']
    assert not row[1] and 'nvcc is missing (pip install' in row[2]


def full(*_, **__):
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')


def test_a_full_gpu_is_one_line(gpu, start, film, folder, tmp_path, monkeypatch):
    there = start.to('cuda')
    monkeypatch.setattr(gsplat, 'rasterization', full)
    with pytest.raises(InputError, match='no memory on the GPU .*2.00 GiB.*; film it smaller'):
        animate_avatar(there, 'nod', tmp_path / 'a.mp4', size=32, options=MotionOptions(0.08))
    with pytest.raises(InputError, match='no memory on the GPU .*--device cpu'):
        run_evaluate(folder, tmp_path)
    with pytest.raises(InputError, match='no memory on the GPU .*--device cpu'):
        run_benchmark(folder, tmp_path)
    monkeypatch.setattr(type(there), 'to', full)
    with pytest.raises(InputError, match='no memory on the GPU .*use --device cpu'):
        run_evaluate(folder, tmp_path)
    with pytest.raises(InputError, match='no memory on the GPU .*fewer --jobs'):
        run_benchmark(folder, tmp_path)
    with pytest.raises(InputError, match='no memory on the GPU .*fewer texels'):
        refine(start, film, 2, device='cuda')


TOO_OLD = (
    'The NVIDIA driver on your system is too old (found version 11040). Please update your GPU '
    'driver by downloading and installing a new version from the URL ...'
)


def no_driver(monkeypatch, tmp_path, has_driver):
    "No GPU for torch; with a program `nvidia-smi`, or without."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(core, '_PROC', tmp_path / 'nowhere')
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if has_driver:
        program = tmp_path / 'nvidia-smi'
        program.write_text('')
        program.chmod(0o755)


def refusal():
    "What a command and doctor say."
    with pytest.raises(InputError) as refused:
        command('demo', '--device', 'cuda')
    (row,) = [row for row in doctor() if row[0] == 'CUDA GPU']
    assert not row[1] and '\n' not in str(refused.value) + row[2]
    assert str(refused.value).startswith('--device cuda needs an NVIDIA GPU: ')
    assert str(refused.value).endswith('or use --device cpu')
    said = str(refused.value).split(': ', 1)[1].removesuffix('; or use --device cpu')
    assert row[2].startswith(said)
    return said


def test_no_gpu_at_all(monkeypatch, tmp_path):
    no_driver(monkeypatch, tmp_path, False)
    assert "NVIDIA's driver is not installed here" in refusal()


def test_torch_without_cuda_beside_a_gpu(monkeypatch, tmp_path):
    no_driver(monkeypatch, tmp_path, True)
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert 'was built without CUDA: pip uninstall torch torchvision, then pip' in refusal()
    (tmp_path / 'nvidia-smi').unlink()
    assert 'driver is not installed' in refusal()
    monkeypatch.setattr(core, '_PROC', tmp_path)  # a container without the program
    assert 'was built without CUDA' in refusal()


def test_a_driver_that_is_too_old(monkeypatch, tmp_path):
    no_driver(monkeypatch, tmp_path, True)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')

    def init():
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.cuda, 'init', init)
    said = refusal()
    assert 'too old (found version 11040)"; it needs a driver for CUDA 13.0: update it' in said


def test_a_gpu_that_is_hidden(monkeypatch, tmp_path):
    no_driver(monkeypatch, tmp_path, True)
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert "CUDA_VISIBLE_DEVICES=''; unset it" in refusal()


def test_a_gpu_of_another_maker(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.version, 'hip', '6.4')
    assert 'is for AMD GPUs, and gsplat' in refusal()


# ------------------------------------------------------------------------ the cells marked `cuda`


# page -> the cells that its cuda cells stand on
NEEDED = {
    'judge/94_gpu_check': 'abeac04d',
    'splats/24_renderers': 'dfd107c6 add9a189 815fc290 7cd0bb37 5f7eb83d',
    'stage2/61_loop': '07392f0c f5eee0e1',
    'doit/real_data': '21dfb45d 909040e1 b90b176f 76ff16aa 8cccf172 9b2d0dc8 0b0ed22b ec5873bc '
    'ed577df5',
}


def cells_of(page):
    "Code by the cell's id, and the names of the page's module."
    cells = [c for c in json.loads(page.read_text())['cells'] if c['cell_type'] == 'code']
    codes = {cell['id']: ''.join(cell['source']) for cell in cells}
    exports = [code.split()[-1] for code in codes.values() if code.startswith('#| default_exp')]
    modules = [import_module(f'spatialavatar0.{name}') for name in exports]
    return codes, {name: value for module in modules for name, value in vars(module).items()}


def test_every_cell_marked_cuda_is_here():
    pages = [house.name(p) for p in house.notebooks() if '"#| cuda' in p.read_text()]
    assert sorted(pages) == sorted(NEEDED)


@pytest.mark.parametrize('name', NEEDED)
def test_cells_marked_cuda(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    codes, place = cells_of(ROOT / 'nbs' / f'{name}.ipynb')

    def run(code):
        exec(compile(code, name, 'exec'), place)

    for cell in NEEDED[name].split():
        run(codes[cell])
    with pretend_cuda():
        for code in codes.values():
            if code.startswith('#| cuda'):
                run(code)
