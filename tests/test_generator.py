"The generator beyond its page: invariances, gradients, files, errors, other heads."

import json
import os
import time
from dataclasses import replace

import pytest
import torch

from spatialavatar0.avatar.avatar import Avatar
from spatialavatar0.ground.core import InputError
from spatialavatar0.head.flame_files import load_flame, write_flame_folder
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.stage1.generator import (
    CHANNELS,
    Generator,
    harmonics,
)

SMALL = dict(unet=(8, 16, 24, 32), encoder=(8, 8, 16, 16), features=8, hidden=8)


@pytest.fixture(scope='module')
def clip():
    c = mono_clip(make_person(1), 12, 64, seed=1)
    return [c[i] for i in (0, 2, 4, 6, 8, 10)]


@pytest.fixture(scope='module')
def gen():
    return Generator.from_preset('tiny', **SMALL)


@pytest.fixture(scope='module')
def looks(gen, clip):
    return gen.looks(clip)


def stir(gen, seed=0, size=0.05):
    "Weights as after some training: what starts at zero no longer is."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in gen.parameters():
            p += size * torch.randn(p.shape, generator=g)
    return gen


# ---- the pool


@pytest.mark.parametrize('pool', ['visible', 'plain', 'attention'])
def test_order_and_number_of_sources(clip, pool):
    g = stir(Generator.from_preset('tiny', pool=pool, **SMALL))
    looks = g.looks(clip)
    assert (g.attention is None) == (pool != 'attention')
    with torch.no_grad():
        a, b = g.encode([looks[:4], looks[3::-1]]).map
        assert (a - b).abs().max() < 1e-4 * a.abs().max()
        for k in (1, 2, 5, 6):
            assert g.encode([looks[:k]]).map.isfinite().all()
        alone = g.encode([looks[:2]]).map[0]
        crowded = g.encode([looks[2:5], looks[:2], looks[5:]]).map[1]
        assert (
            alone - crowded
        ).abs().max() < 1e-4 * a.abs().max()  # who else is in the batch does not matter
        skin, shells, w, token = g.warp(looks[:1])
        pooled, seen, t = g.gather(skin, shells, w, token)
        f = g.config.source_features + 4
        assert torch.equal(seen, w[0, 0])
        assert torch.allclose(t, token[0])  # K = 1 is the identity
        assert torch.allclose(
            pooled[:, :f],
            (skin[0] if pool != 'visible' else skin[0] * (w[0, 0] > 0)[:, None]) * seen[:, None],
            atol=1e-6,
        )


def test_a_copy_of_a_source_adds_nothing(gen, looks):
    with torch.no_grad():
        a, b = gen.encode([looks[:2], looks[:2] * 3]).map
    assert (a - b).abs().max() < 1e-4


def test_what_is_seen_grows_with_sources(gen, looks):
    with torch.no_grad():
        seen = [gen.encode([looks[:k]]).seen.sum() for k in (1, 2, 4)]
    assert seen[0] <= seen[1] <= seen[2]


# ---- gradients


@pytest.mark.parametrize(
    'changes',
    [{}, dict(pool='attention'), dict(residual=False, view=False, mirror=False, shells=(0.0,))],
)
def test_gradients_reach_every_weight(clip, changes):
    g = stir(Generator.from_preset('tiny', **{**SMALL, **changes}))
    looks = g.looks(clip)
    rgb, alpha, d = g.render(g.encode([looks[:3], looks[3:5]]), looks[4:6], torch.rand(2, 3))
    (
        rgb.square().mean() + alpha.mean() + sum(x.square().mean() for x in d.maps.values())
    ).backward()
    dead = [n for n, p in g.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead
    assert all(p.grad.isfinite().all() for p in g.parameters())


def test_residual_starts_as_nothing_and_leaves_opacity_alone(gen, looks):
    code = gen.encode([looks[:2]])
    c = torch.randn(1, gen.code_size)
    assert not any(x.any() for x in gen.decode(code, expr_code=c).residual.values())
    other = stir(Generator.from_preset('tiny', **SMALL))
    code = other.encode([looks[:2]])
    a = other.decode(code)
    b = other.decode(code, expr_code=c)
    for k in CHANNELS:
        assert torch.equal(a.maps[k], b.maps[k]) == (k == 'opacity')


def test_view_jacobian_goes_through_the_heads_alone(gen, looks):
    gamma = harmonics(torch.tensor([[0.0, 0, -1]])).requires_grad_()
    code = gen.encode([looks[:1]])
    (slope,) = torch.autograd.grad(
        gen.decode(code, gamma=gamma).maps['position'].sum(), gamma, create_graph=True
    )
    grads = torch.autograd.grad(
        slope.square().sum(), list(gen.heads.parameters()), allow_unused=True, retain_graph=True
    )
    assert sum(g is not None and bool(g.any()) for g in grads) >= 2
    blind = Generator.from_preset('tiny', view=False, **SMALL)
    code = blind.encode([looks[:1]])
    assert torch.equal(
        blind.decode(code, torch.tensor([[0.0, 0, -1]])).maps['color'],
        blind.decode(code, torch.tensor([[1.0, 0, 0]])).maps['color'],
    )


def test_a_few_steps_lower_the_loss(clip):
    g = Generator.from_preset('tiny', **SMALL)
    looks = g.looks(clip)
    opt = torch.optim.Adam(g.parameters(), 5e-3)
    losses = []
    y = looks[4].target([0.5, 0.5, 0.5])[0]
    for _ in range(25):
        loss = (g.render(g.encode([looks[:2]]), looks[4], (0.5, 0.5, 0.5))[0][0] - y).abs().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ---- what comes out


def test_an_avatar(gen, clip, looks):
    a = gen(clip[:3])
    assert isinstance(a, Avatar)
    assert len(a) == len(gen.binding)
    assert a.info['sources'] == 3
    b = gen([looks[2], looks[0], looks[1]])
    for k in a.splats:
        assert torch.allclose(a.splats[k], b.splats[k], atol=1e-4), k
    assert torch.allclose(a.shape[:, : clip[0].params['shape'].shape[1]], clip[0].params['shape'])
    f = clip[1]
    rgb, alpha = a.render(f.viewmat, f.K, 64, 64, **f.pose)
    assert rgb.isfinite().all() and alpha.max() > 0.9
    assert len(gen(clip[0])) == len(a)  # a single frame will do


def test_an_avatar_is_a_file(gen, clip, tmp_path):
    a = gen(clip[:2])
    a.save(tmp_path / 'a.safetensors')
    b = Avatar.load(tmp_path / 'a.safetensors')
    for k in a.splats:
        assert torch.equal(a.splats[k], b.splats[k])


def test_determinism(clip):
    a, b = (Generator.from_preset('tiny', seed=3, **SMALL) for _ in range(2))
    torch.manual_seed(99)
    for x, y in zip(a(clip[:2]).splats.values(), b(clip[:2]).splats.values()):
        assert torch.equal(x, y)
    before = torch.random.get_rng_state()
    Generator.from_preset('tiny', **SMALL)
    assert torch.equal(
        before, torch.random.get_rng_state()
    )  # making one leaves the random numbers alone


def test_looks_do_not_know_the_hair(gen, clip):
    p = make_person(1)
    worn = replace(clip[0], params=dict(clip[0].params, static_offset=p.static_offset[None]))
    a, b = gen.look(worn), gen.look(replace(clip[0]))
    assert torch.equal(a.uv, b.uv)
    assert 'static_offset' not in a.params


def test_the_skull_turns_or_the_camera_does(gen, clip):
    from spatialavatar0.ground.geometry import axis_angle_to_mat

    turn = torch.tensor([[0.1, 0.6, 0.0]])
    R = torch.eye(4)
    R[:3, :3] = axis_angle_to_mat(turn)[0]
    f = clip[0]
    still = {k: v for k, v in f.params.items() if k not in ('rotation', 'neck', 'translation')}
    a = gen.look(replace(f, params=dict(still, rotation=turn))).direction
    b = gen.look(replace(f, params=still, viewmat=f.viewmat @ R)).direction
    assert torch.allclose(a, b, atol=1e-5)
    assert abs(float(a.norm()) - 1) < 1e-5


def test_pictures_of_another_size_are_resized(gen):
    c = mono_clip(make_person(1), 8, 128, seed=1)
    l = gen.look(c[0])
    small = gen.look(mono_clip(make_person(1), 8, 64, seed=1)[0])
    assert l.size == 64
    assert (l.uv.float() - small.uv.float()).abs().max() < 0.01


# ---- files


def test_save_and_load(gen, looks, tmp_path):
    path = tmp_path / 'g.safetensors'
    g = stir(Generator.from_preset('tiny', pool='attention', view=False, **SMALL))
    g.save(path, steps=7)
    again = Generator.from_pretrained(path)
    assert again.config == g.config and not again.training
    for (n, x), (m, y) in zip(g.state_dict().items(), again.state_dict().items()):
        assert n == m and torch.equal(x, y)
    with torch.no_grad():
        assert torch.equal(g.encode([looks[:3]]).map, again.encode([looks[:3]]).map)


def test_files_that_cannot_be_used(gen, clip, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / 'g.safetensors'
    gen.save(path)
    good = path.read_bytes()
    t = load_file(path)
    from safetensors import safe_open

    with safe_open(path, 'pt') as f:
        meta = json.loads(f.metadata()['spatialavatar0_generator'])

    def written(t, **changes):
        save_file(t, path, metadata=dict(spatialavatar0_generator=json.dumps({**meta, **changes})))
        return path

    for data in (good[:1000], b'', b'no safetensors at all', good[:-100]):
        path.write_bytes(data)
        with pytest.raises(InputError, match='not a readable checkpoint'):
            Generator.from_pretrained(path)
    gen(clip[:1]).save(path)
    with pytest.raises(InputError, match='not a generator'):
        Generator.from_pretrained(path)
    k = next(iter(t))
    for bad, match in ((written({n: v for n, v in t.items() if n != k}), '1 missing'),):
        with pytest.raises(InputError, match=match):
            Generator.from_pretrained(bad)
    with pytest.raises(InputError, match='1 unknown'):
        Generator.from_pretrained(written({**t, 'other': torch.zeros(1)}))
    with pytest.raises(InputError, match='nan or inf'):
        Generator.from_pretrained(written({**t, k: t[k] * float('nan')}))
    with pytest.raises(InputError, match='should be'):
        Generator.from_pretrained(written({**t, k: t[k].flatten()[:1]}))
    with pytest.raises(InputError, match='update spatialavatar0'):
        Generator.from_pretrained(written(t, schema=99))
    with pytest.raises(InputError, match='another head'):
        Generator.from_pretrained(written(t, head='0' * 16))
    with pytest.raises(InputError, match='configuration'):
        Generator.from_pretrained(written(t, config={**meta['config'], 'pool': 7}))
    with pytest.raises(InputError, match='no generator at'):
        Generator.from_pretrained(tmp_path / 'nothing')


# ---- errors


def test_wrong_input(gen, clip, looks):
    for frames in ([], ()):
        with pytest.raises(InputError, match='K = 0'):
            gen(frames)
    with pytest.raises(InputError, match='K = 0'):
        gen.encode([looks[:1], []])
    with pytest.raises(InputError, match='K = 0'):
        gen.encode([])
    big = mono_clip(make_person(1), 8, 96)[0]
    with pytest.raises(InputError, match='share one size'):
        gen([clip[0], big])
    with pytest.raises(InputError, match='square'):
        gen(replace(clip[0], image=clip[0].image[:40], mask=clip[0].mask[:40]))
    for k in ('viewmat', 'K'):
        with pytest.raises(InputError, match='no camera'):
            gen(replace(clip[0], **{k: torch.zeros_like(getattr(clip[0], k))}))
        with pytest.raises(InputError, match='no camera'):
            gen(replace(clip[0], **{k: getattr(clip[0], k) * float('nan')}))
    for k in ('image', 'mask'):
        x = getattr(clip[0], k).clone()
        x[0, 0] = float('inf')
        with pytest.raises(InputError, match=f'NaN or infinite values in its {k}'):
            gen(replace(clip[0], **{k: x}))
    with pytest.raises(InputError, match='params'):
        gen(replace(clip[0], params=dict(clip[0].params, expr=torch.full((1, 52), float('nan')))))
    with pytest.raises(InputError, match='shows anything'):
        gen(replace(clip[0], mask=torch.zeros(64, 64)))
    with pytest.raises(InputError, match='should be a Frame'):
        gen(['photo.jpg'])
    with pytest.raises(InputError, match='another generator'):
        Generator.from_preset('tiny', **{**SMALL, 'shells': (0.0,)}).encode([looks[:1]])


def test_wrong_configurations():
    with pytest.raises(InputError, match='tiny, laptop, paper'):
        Generator.from_preset('large')
    for changes, match in (
        (dict(pool='max'), 'pool should be'),
        (dict(shells=(0.01,)), 'start at 0'),
        (dict(resolution=30), 'multiple of 8'),
        (dict(image_size=50), 'multiple of 16'),
        (dict(width=3), 'width'),
    ):
        with pytest.raises(InputError, match=match):
            Generator.from_preset('tiny', **changes)


# ---- other heads


def test_a_flame_head(tmp_path, clip):
    "Regions by other names or none, other numbers of vertices and expressions."
    flame = load_flame(
        write_flame_folder(open_head(), tmp_path / 'open'), num_shape=20, num_expr=30
    )
    g = stir(Generator.from_preset('tiny', head=flame, **SMALL), size=0.01)
    assert g.code_size == 42
    frames = [
        replace(
            f,
            params={
                k: v
                for k, v in f.params.items()
                if k in ('jaw', 'neck', 'rotation', 'eyes', 'translation')
            },
        )
        for f in clip[:3]
    ]
    a = g(frames[:2])
    assert a.head is flame
    assert all(x.isfinite().all() for x in a.splats.values())
    rgb, _, _ = g.render(g.encode([g.looks(frames[:2])]), g.look(frames[2]))
    rgb.mean().backward()
    g.save(tmp_path / 'g.safetensors')
    Generator.from_pretrained(tmp_path / 'g.safetensors', flame)
    with pytest.raises(InputError, match='another head'):
        Generator.from_pretrained(tmp_path / 'g.safetensors')


# ---- the paper's encoder

VIT = dict(SMALL, encoder=(), backbone='vit_tiny_patch16_dinov3_qkvb', token=192)


def test_a_vision_transformer_behind_the_same_interface(clip, tmp_path):
    pytest.importorskip('timm')
    g = stir(Generator.from_preset('tiny', weights=False, **VIT), size=0.01)
    looks = g.looks(clip)
    rgb, _, _ = g.render(g.encode([looks[:2]]), looks[3])
    rgb.mean().backward()
    assert not g.train().encoder.backbone.training
    assert all(p.grad is None for p in g.encoder.backbone.parameters())  # frozen
    assert not [n for n, p in g.named_parameters() if p.requires_grad and p.grad is None]
    g.save(tmp_path / 'g.safetensors')
    again = Generator.from_pretrained(tmp_path / 'g.safetensors')
    with torch.no_grad():
        assert torch.equal(g.eval().encode([looks[:2]]).map, again.encode([looks[:2]]).map)


def test_backbone_weights_that_cannot_be_had(monkeypatch):
    timm = pytest.importorskip('timm')

    def offline(*a, pretrained, **kw):
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
    start = time.perf_counter()
    g = Generator.from_preset('paper', weights=False)
    built = time.perf_counter()
    c = mono_clip(make_person(1), 8, 512, seed=1)
    looks = g.looks([c[0], c[4]])
    looked = time.perf_counter()
    rgb, _, _ = g.render(g.encode([looks[:1]]), looks[1])
    assert rgb.shape == (1, 512, 512, 3)
    forward = time.perf_counter()
    rgb.mean().backward()
    done = time.perf_counter()
    assert 50_000 < len(g.binding) < 66_000
    import resource

    print(
        f'{len(g.binding):,} Gaussians, {sum(p.numel() for p in g.parameters()) / 1e6:.0f} M weights, {sum(p.numel() for p in g.parameters() if p.requires_grad) / 1e6:.1f} M trained; built {built - start:.1f} s, looks {looked - built:.1f} s, '
        f'forward {forward - looked:.1f} s, backward {done - forward:.1f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB'
    )
    g.eval()
    g.save(tmp_path / 'paper.safetensors')
    again = Generator.from_pretrained(tmp_path / 'paper.safetensors')
    with torch.no_grad():
        assert torch.equal(g.encode([looks[:1]]).map, again.encode([looks[:1]]).map)
