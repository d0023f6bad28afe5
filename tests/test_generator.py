"The generator beyond its page: invariances, gradients, files, errors, other heads."

import json
import os
import resource
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spatialavatar0.avatar.avatar import Avatar, part_is
from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import axis_angle_to_mat
from spatialavatar0.head.flame_files import load_flame, write_flame_folder
from spatialavatar0.head.head import open_head
from spatialavatar0.judge.benchmark import live
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.stage1.backbone import backbone_of
from spatialavatar0.stage1.generator import AS_PRINTED, Generator, preset
from spatialavatar0.stage1.network import CHANNELS, harmonics

SMALL = dict(unet=(8, 16, 24, 32), encoder=(8, 8, 16, 16), features=8, hidden=8)
FRONT = torch.tensor([[0.0, 0, -1]])


@pytest.fixture(scope='module')
def clip():
    whole = mono_clip(make_person(1), 12, 64, seed=1)
    return [whole[i] for i in (0, 2, 4, 6, 8, 10)]


@pytest.fixture(scope='module')
def gen():
    return Generator.from_preset('tiny', **SMALL)


@pytest.fixture(scope='module')
def looks(gen, clip):
    return gen.looks(clip)


def stir(generator, seed=0, size=0.05):
    "Weights as after some training: what starts at zero no longer is."
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in generator.parameters():
            param += size * torch.randn(param.shape, generator=rng)
    return generator


def largest(difference):
    return float(difference.abs().max())


# ---- the pool


@pytest.mark.parametrize('pool', ['visible', 'plain', 'attention'])
@torch.no_grad()
def test_order_and_number_of_sources(clip, pool):
    generator = stir(Generator.from_preset('tiny', pool=pool, **SMALL))
    looks = generator.looks(clip)
    assert (generator.attention is None) == (pool != 'attention')
    there, back = generator.encode([looks[:4], looks[3::-1]]).map
    tolerance = 1e-4 * largest(there)
    assert largest(there - back) < tolerance
    for K in (1, 2, 5, 6):
        assert generator.encode([looks[:K]]).map.isfinite().all()
    alone = generator.encode([looks[:2]]).map[0]
    crowded = generator.encode([looks[2:5], looks[:2], looks[5:]]).map[1]
    assert largest(alone - crowded) < tolerance  # who else is in the batch does not matter


@pytest.mark.parametrize('pool', ['visible', 'plain', 'attention'])
@torch.no_grad()
def test_one_source_is_the_identity(clip, pool):
    generator = stir(Generator.from_preset('tiny', pool=pool, **SMALL))
    warped = generator.warp(generator.looks(clip[:1]))
    pooled = generator.gather(*warped)
    skin, seen = warped.skin[0], warped.weights[0, 0]
    if pool == 'visible':
        skin = skin * (seen > 0)[:, None]
    columns = generator.config.source_features + 4
    assert torch.equal(pooled.seen, seen)
    assert torch.allclose(pooled.token, warped.tokens[0])
    assert torch.allclose(pooled.values[:, :columns], skin * seen[:, None], atol=1e-6)


@torch.no_grad()
def test_a_copy_of_a_source_adds_nothing(gen, looks):
    once, thrice = gen.encode([looks[:2], looks[:2] * 3]).map
    assert largest(once - thrice) < 1e-4


@torch.no_grad()
def test_what_is_seen_grows_with_sources(gen, looks):
    seen = [gen.encode([looks[:K]]).seen.sum() for K in (1, 2, 4)]
    assert seen[0] <= seen[1] <= seen[2]


# ---- gradients and switches

PLAIN = dict(residual=False, view=False, mirror=False, shells=(0.0,))


@pytest.mark.parametrize('changes', [{}, dict(pool='attention'), PLAIN, AS_PRINTED])
def test_gradients_reach_every_weight(clip, changes):
    generator = stir(Generator.from_preset('tiny', **{**SMALL, **changes}))
    looks = generator.looks(clip)
    code = generator.encode([looks[:3], looks[3:5]])
    rgb, alpha, decoded = generator.render(code, looks[4:6], torch.rand(2, 3))
    sizes = sum(values.square().mean() for values in decoded.maps.values())
    (rgb.square().mean() + alpha.mean() + sizes).backward()
    params = dict(generator.named_parameters())
    dead = [name for name, param in params.items() if param.grad is None or not param.grad.any()]
    assert not dead
    assert all(param.grad.isfinite().all() for param in params.values())


def test_presets():
    "`ours` has all that we add, `paper` nothing of it; their sizes are the same."
    ours, paper = preset('ours'), preset('paper')
    assert replace(ours, **AS_PRINTED) == paper
    assert not any(getattr(ours, name) == value for name, value in AS_PRINTED.items())
    added = {name: getattr(ours, name) for name in AS_PRINTED}
    assert added == {name: getattr(preset('laptop'), name) for name in AS_PRINTED}
    assert (paper.image_size, paper.resolution, paper.features) == (512, 256, 32)
    assert [backbone_of(size)['token'] for size in 'SBL'] == [384, 768, 1024]
    with pytest.raises(InputError, match='S, B or L'):
        backbone_of('XL')


@torch.no_grad()
def test_live_hears_view_and_expression(clip):
    "Each picture has Gaussians of its own; the baked avatar is the one of a neutral front view."
    generator = stir(Generator.from_preset('tiny', **SMALL))
    person, baked = live(generator, clip[:2]), generator(clip[:2])
    frame, other = clip[2], clip[4]
    camera = frame.viewmat, frame.K, frame.width, frame.height
    look = generator.look(frame)
    drawn = generator.render(person.code, look).rgb[0]
    assert torch.allclose(person.render(*camera, **frame.pose)[0], drawn, atol=1e-5)
    posed = person.posed(frame.viewmat, **frame.pose).splats
    assert not torch.equal(posed['sh0'], person.posed(frame.viewmat, **other.pose).splats['sh0'])
    front = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    at_rest = person.posed(front).splats
    assert all(torch.allclose(x, baked.splats[name], atol=1e-6) for name, x in at_rest.items())


@torch.no_grad()
def test_the_paper_sees_the_camera_in_the_world(clip):
    "Eq. 6 as printed has nothing of the head's own turn."
    frame = clip[2]
    turned = {**frame.params, 'rotation': torch.tensor([[0.0, 0.5, 0.0]])}
    ours, paper = (Generator.from_preset('tiny', **SMALL, **x) for x in ({}, AS_PRINTED))
    one, two = (paper.direction(frame.viewmat, params) for params in (frame.params, turned))
    assert torch.equal(one, two)
    assert torch.equal(one, frame.viewmat[:3, 2])
    assert not torch.allclose(ours.direction(frame.viewmat, turned), one, atol=0.1)


@torch.no_grad()
def test_the_paper_knows_no_visibility(clip):
    "What a z-buffer says changes our network's answer, and not the paper's."
    for switches, same in ((AS_PRINTED, True), ({}, False)):
        generator = stir(Generator.from_preset('tiny', **SMALL, **switches))
        looks = generator.looks(clip[:2])
        half = [replace(look, weight=look.weight // 2) for look in looks[:1]] + looks[1:]
        there, other = generator.encode([looks, half]).map
        assert torch.equal(there, other) == same


@torch.no_grad()
def test_colours_go_around_our_network_only(clip):
    "Untrained, ours draws the person and the paper's a grey head; teeth are left bare."
    first = {}
    for name, switches in dict(ours={}, paper=AS_PRINTED).items():
        generator = Generator.from_preset('tiny', **SMALL, **switches)
        avatar = generator(clip[:2])
        first[name] = avatar.splats['sh0'].std(0).mean()
        on_teeth = part_is(avatar.head, avatar.binding, 'teeth_up', 'teeth_low')
        assert bool(on_teeth.any()) == (name == 'ours')
        assert len(avatar.seen) == len(avatar) == len(avatar.splats['quats'])
    assert first['ours'] > 10 * first['paper']


@pytest.mark.parametrize('changes', [{}, AS_PRINTED])
def test_a_file_keeps_the_switches(clip, tmp_path, changes):
    generator = stir(Generator.from_preset('tiny', **SMALL, **changes)).eval()
    generator.save(tmp_path / 'g.safetensors')
    again = Generator.from_pretrained(tmp_path / 'g.safetensors')
    assert again.config == generator.config
    one, other = (g(clip[:2]).splats['sh0'] for g in (generator, again))
    assert torch.equal(one, other)


def kept_bytes(work):
    "Bytes that autograd keeps for the way back; the loss of `work`."
    seen = {}

    def keep(x):
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = work()
    return sum(seen.values()), loss


def test_recomputed_is_the_same_in_less_memory(clip):
    generator = stir(Generator.from_preset('tiny', **SMALL))
    looks = generator.looks(clip)
    backgrounds = torch.zeros(2, 3)

    def loss():
        code = generator.encode([looks[:4], looks[2:6]])
        gamma = harmonics(FRONT).expand(2, -1).clone().requires_grad_()
        decoded = generator.decode(code, gamma=gamma)
        position = decoded.maps['position'].sum()
        (slope,) = torch.autograd.grad(position, gamma, create_graph=True)
        drawn = [generator.draw(*person) for person in zip(decoded.splats, looks, backgrounds)]
        return sum(rgb.mean() for rgb, _ in drawn) + slope.square().sum()

    found = []
    for rows in (0, 2):
        generator.recompute = rows
        generator.zero_grad()
        size, _ = kept_bytes(lambda: generator.encode([looks[:4], looks[2:6]]))
        loss().backward()
        found.append((size, {name: p.grad.clone() for name, p in generator.named_parameters()}))
    (whole, grads), (lean, again) = found
    assert lean < 0.4 * whole
    for name, grad in grads.items():
        assert largest(again[name] - grad) <= 1e-5 * largest(grad) + 1e-9, name


def test_residual_starts_as_nothing_and_leaves_opacity_alone(gen, looks):
    expression = torch.randn(1, gen.code_size)
    first = gen.decode(gen.encode([looks[:2]]), expr_code=expression)
    assert not any(delta.any() for delta in first.residual.values())
    stirred = stir(Generator.from_preset('tiny', **SMALL))
    code = stirred.encode([looks[:2]])
    calm, lively = stirred.decode(code), stirred.decode(code, expr_code=expression)
    for name in CHANNELS:
        assert torch.equal(calm.maps[name], lively.maps[name]) == (name == 'opacity')


def test_view_jacobian_goes_through_the_heads_alone(gen, looks):
    gamma = harmonics(FRONT).requires_grad_()
    position = gen.decode(gen.encode([looks[:1]]), gamma=gamma).maps['position']
    (slope,) = torch.autograd.grad(position.sum(), gamma, create_graph=True)
    params = list(gen.heads.parameters())
    options = dict(allow_unused=True, retain_graph=True)
    grads = torch.autograd.grad(slope.square().sum(), params, **options)
    assert sum(grad is not None and bool(grad.any()) for grad in grads) >= 2


def test_a_generator_without_the_view_input_is_blind(looks):
    blind = Generator.from_preset('tiny', view=False, **SMALL)
    code = blind.encode([looks[:1]])
    views = FRONT, torch.tensor([[1.0, 0, 0]])
    from_front, from_side = (blind.decode(code, view).maps['color'] for view in views)
    assert torch.equal(from_front, from_side)


def test_a_few_steps_lower_the_loss(clip):
    generator = Generator.from_preset('tiny', **SMALL)
    looks = generator.looks(clip)
    optimiser = torch.optim.Adam(generator.parameters(), 5e-3)
    grey, losses = (0.5, 0.5, 0.5), []
    truth = looks[4].target(grey)[0]
    for _ in range(25):
        rgb = generator.render(generator.encode([looks[:2]]), looks[4], grey).rgb[0]
        loss = (rgb - truth).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ---- what comes out


def test_an_avatar(gen, clip, looks):
    avatar = gen(clip[:3])
    assert isinstance(avatar, Avatar)
    assert len(avatar) == len(gen.binding)
    assert avatar.info['sources'] == 3
    shuffled = gen([looks[2], looks[0], looks[1]])
    for name, values in avatar.splats.items():
        assert torch.allclose(values, shuffled.splats[name], atol=1e-4), name
    shape = clip[0].params['shape']
    assert torch.allclose(avatar.shape[:, : shape.shape[1]], shape)
    frame = clip[1]
    rgb, alpha = avatar.render(frame.viewmat, frame.K, 64, 64, **frame.pose)
    assert rgb.isfinite().all()
    assert alpha.max() > 0.9
    assert len(gen(clip[0])) == len(avatar)  # a single frame will do


def test_an_avatar_is_a_file(gen, clip, tmp_path):
    avatar = gen(clip[:2])
    avatar.save(tmp_path / 'a.safetensors')
    again = Avatar.load(tmp_path / 'a.safetensors')
    for name, values in avatar.splats.items():
        assert torch.equal(values, again.splats[name])


def test_determinism(clip):
    first, second = (Generator.from_preset('tiny', seed=3, **SMALL) for _ in range(2))
    torch.manual_seed(99)
    avatars = first(clip[:2]), second(clip[:2])
    for one, other in zip(*[avatar.splats.values() for avatar in avatars]):
        assert torch.equal(one, other)
    before = torch.random.get_rng_state()
    Generator.from_preset('tiny', **SMALL)
    assert torch.equal(before, torch.random.get_rng_state())  # the random numbers are left alone


def test_looks_do_not_know_the_hair(gen, clip):
    hair = make_person(1).static_offset[None]
    worn = replace(clip[0], params=dict(clip[0].params, static_offset=hair))
    with_hair, without = gen.look(worn), gen.look(clip[0])
    assert torch.equal(with_hair.uv, without.uv)
    assert 'static_offset' not in with_hair.params


def test_the_skull_turns_or_the_camera_does(gen, clip):
    turn, camera, frame = torch.tensor([[0.1, 0.6, 0.0]]), torch.eye(4), clip[0]
    camera[:3, :3] = axis_angle_to_mat(turn)[0]
    moving = 'rotation', 'neck', 'translation'
    still = {name: x for name, x in frame.params.items() if name not in moving}
    by_skull = gen.look(replace(frame, params=dict(still, rotation=turn))).direction
    by_camera = gen.look(replace(frame, params=still, viewmat=frame.viewmat @ camera)).direction
    assert torch.allclose(by_skull, by_camera, atol=1e-5)
    assert abs(float(by_skull.norm()) - 1) < 1e-5


def test_pictures_of_another_size_are_resized(gen):
    large, small = (mono_clip(make_person(1), 8, size, seed=1)[0] for size in (128, 64))
    look = gen.look(large)
    assert look.size == 64
    assert largest(look.uv.float() - gen.look(small).uv.float()) < 0.01


# ---- files


def test_save_and_load(looks, tmp_path):
    path = tmp_path / 'g.safetensors'
    generator = stir(Generator.from_preset('tiny', pool='attention', view=False, **SMALL))
    generator.save(path, steps=7)
    again = Generator.from_pretrained(path)
    assert again.config == generator.config
    assert not again.training
    mine, theirs = generator.state_dict(), again.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(values, theirs[name]) for name, values in mine.items())
    with torch.no_grad():
        maps = [g.encode([looks[:3]]).map for g in (generator, again)]
    assert torch.equal(*maps)


def refuse(path, match):
    with pytest.raises(InputError, match=match):
        Generator.from_pretrained(path)


def test_files_that_broke_off_or_are_others(gen, clip, tmp_path):
    path = tmp_path / 'g.safetensors'
    gen.save(path)
    good = path.read_bytes()
    for data in (good[:1000], b'', b'no safetensors at all', good[:-100]):
        path.write_bytes(data)
        refuse(path, 'not a readable checkpoint')
    gen(clip[:1]).save(path)
    refuse(path, 'not a generator')
    refuse(tmp_path / 'nothing', 'no generator at')


def test_files_with_wrong_weights_or_headers(gen, tmp_path):
    path = tmp_path / 'g.safetensors'
    gen.save(path)
    key, tensors = 'spatialavatar0_generator', load_file(path)
    with safe_open(path, 'pt') as file:
        meta = json.loads(file.metadata()[key])
    first = next(iter(tensors))

    def refuse_written(match, tensors=tensors, **changes):
        save_file(tensors, path, metadata={key: json.dumps({**meta, **changes})})
        refuse(path, match)

    refuse_written('1 missing', {n: x for n, x in tensors.items() if n != first})
    refuse_written('1 unknown', {**tensors, 'other': torch.zeros(1)})
    refuse_written('nan or inf', {**tensors, first: tensors[first] * float('nan')})
    refuse_written('should be', {**tensors, first: tensors[first].flatten()[:1]})
    refuse_written('update spatialavatar0', schema=99)
    refuse_written('another head', head='0' * 16)
    refuse_written('config', config={**meta['config'], 'pool': 7})


# ---- errors


def refuse_frames(generator, frames, match):
    with pytest.raises(InputError, match=match):
        generator(frames)


def test_wrong_sources(gen, clip, looks):
    for none in ([], ()):
        refuse_frames(gen, none, 'K = 0')
    for nobody in ([looks[:1], []], []):
        with pytest.raises(InputError, match='K = 0'):
            gen.encode(nobody)
    refuse_frames(gen, [clip[0], mono_clip(make_person(1), 8, 96)[0]], 'share one size')
    refuse_frames(gen, ['photo.jpg'], 'should be a Frame')
    other = Generator.from_preset('tiny', **{**SMALL, 'shells': (0.0,)})
    with pytest.raises(InputError, match='another generator'):
        other.encode([looks[:1]])


def test_wrong_frames(gen, clip):
    frame = clip[0]
    wide = replace(frame, image=frame.image[:40], mask=frame.mask[:40])
    refuse_frames(gen, wide, 'square')
    refuse_frames(gen, replace(frame, mask=torch.zeros(64, 64)), 'shows anything')
    for name in ('viewmat', 'K'):
        values = getattr(frame, name)
        refuse_frames(gen, replace(frame, **{name: torch.zeros_like(values)}), 'no camera')
        refuse_frames(gen, replace(frame, **{name: values * float('nan')}), 'no camera')
    for name in ('image', 'mask'):
        values = getattr(frame, name).clone()
        values[0, 0] = float('inf')
        bad = replace(frame, **{name: values})
        refuse_frames(gen, bad, f'NaN or infinite values in its {name}')
    params = dict(frame.params, expr=torch.full((1, 52), float('nan')))
    refuse_frames(gen, replace(frame, params=params), 'params')


@pytest.mark.parametrize(
    'changes, match',
    [
        (dict(pool='max'), 'pool should be'),
        (dict(shells=(0.01,)), 'start at 0'),
        (dict(visibility=False), "pool='visible' weighs by visibility"),
        (dict(visibility=False, pool='plain'), 'bypass completes'),
        (dict(bypass=False), 'shells give colours that go around'),
        (dict(resolution=30), 'multiple of 8'),
        (dict(image_size=50), 'multiple of 16'),
        (dict(width=3), 'width'),
    ],
)
def test_wrong_configurations(changes, match):
    with pytest.raises(InputError, match=match):
        Generator.from_preset('tiny', **changes)


def test_an_unknown_preset():
    with pytest.raises(InputError, match='tiny, laptop, ours, paper'):
        Generator.from_preset('large')


# ---- other heads


def test_a_flame_head(tmp_path, clip):
    "Regions by other names or none, other numbers of vertices and expressions."
    folder = write_flame_folder(open_head(), tmp_path / 'open')
    flame = load_flame(folder, num_shape=20, num_expr=30)
    generator = stir(Generator.from_preset('tiny', head=flame, **SMALL), size=0.01)
    assert generator.code_size == 42
    pose = 'jaw', 'neck', 'rotation', 'eyes', 'translation'
    frames = []
    for frame in clip[:3]:
        params = {name: values for name, values in frame.params.items() if name in pose}
        frames.append(replace(frame, params=params))
    avatar = generator(frames[:2])
    assert avatar.head is flame
    assert all(values.isfinite().all() for values in avatar.splats.values())
    code = generator.encode([generator.looks(frames[:2])])
    generator.render(code, generator.look(frames[2])).rgb.mean().backward()
    generator.save(tmp_path / 'g.safetensors')
    Generator.from_pretrained(tmp_path / 'g.safetensors', flame)
    refuse(tmp_path / 'g.safetensors', 'another head')


# ---- the paper's encoder

VIT = dict(SMALL, encoder=(), backbone='vit_tiny_patch16_dinov3_qkvb', token=192)


def test_a_vision_transformer_behind_the_same_interface(clip, tmp_path):
    pytest.importorskip('timm')
    generator = stir(Generator.from_preset('tiny', weights=False, **VIT), size=0.01)
    looks = generator.looks(clip)
    generator.render(generator.encode([looks[:2]]), looks[3]).rgb.mean().backward()
    assert not generator.train().encoder.backbone.training
    assert all(param.grad is None for param in generator.encoder.backbone.parameters())  # frozen
    trained = {name: p for name, p in generator.named_parameters() if p.requires_grad}
    assert not [name for name, param in trained.items() if param.grad is None]
    generator.save(tmp_path / 'g.safetensors')
    again = Generator.from_pretrained(tmp_path / 'g.safetensors')
    with torch.no_grad():
        maps = [g.encode([looks[:2]]).map for g in (generator.eval(), again)]
    assert torch.equal(*maps)


def test_backbone_weights_that_cannot_be_had(monkeypatch):
    timm = pytest.importorskip('timm')

    def offline(*names, pretrained, **options):
        raise OSError('offline')

    monkeypatch.setattr(timm, 'create_model', offline)
    with pytest.raises(InputError, match='weights=False'):
        Generator.from_preset('tiny', **VIT)
    with pytest.raises(InputError, match='no model'):
        Generator.from_preset('tiny', **{**VIT, 'backbone': 'vit_imaginary'})


@pytest.mark.skipif(not os.environ.get('SLOW'), reason='minutes and 3 GB; SLOW=1 runs it')
def test_the_papers_sizes(tmp_path):
    "Built, one step, saved, loaded: random weights; minutes on a CPU."
    pytest.importorskip('timm')
    times = {'start': time.perf_counter()}
    generator = Generator.from_preset('paper', weights=False)
    times['built'] = time.perf_counter()
    clip = mono_clip(make_person(1), 8, 512, seed=1)
    looks = generator.looks([clip[0], clip[4]])
    times['looks'] = time.perf_counter()
    rgb = generator.render(generator.encode([looks[:1]]), looks[1]).rgb
    assert rgb.shape == (1, 512, 512, 3)
    times['forward'] = time.perf_counter()
    rgb.mean().backward()
    times['backward'] = time.perf_counter()
    tell_sizes(generator, times)
    generator.eval().save(tmp_path / 'paper.safetensors')
    again = Generator.from_pretrained(tmp_path / 'paper.safetensors')
    with torch.no_grad():
        maps = [g.encode([looks[:1]]).map for g in (generator, again)]
    assert torch.equal(*maps)


def tell_sizes(generator, times):
    "Gaussians, weights, seconds and memory."
    assert 50_000 < len(generator.binding) < 66_000
    counts = {p: p.numel() for p in generator.parameters()}
    trained = sum(count for param, count in counts.items() if param.requires_grad)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f'{len(generator.binding):,} Gaussians, {sum(counts.values()) / 1e6:.0f} M weights')
    print(f'{trained / 1e6:.1f} M of them trained, peak {memory:.1f} GB')
    names = list(times)
    for before, after in zip(names, names[1:]):
        print(f'{after}: {times[after] - times[before]:.1f} s')
