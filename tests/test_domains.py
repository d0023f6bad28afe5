"""Domains of painted people: the same everywhere, honest noise, tests of people nobody trains on."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from spatialavatar0.ground.core import InputError
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures import domains
from spatialavatar0.pictures.clips import read_vhap, write_vhap
from spatialavatar0.pictures.domains import (
    held_out,
    make_character,
    mono,
    multi,
    people,
    person_seed,
    shifted,
)

ALL = (mono, multi, shifted)


@pytest.fixture(scope='module')
def head():
    return open_head()


def digest(frames):
    "One number for pictures, mattes, cameras and parameters."
    h = hashlib.sha256()
    for f in frames:
        for x in (f.image, f.mask, f.viewmat, f.K, *(f.params[k] for k in sorted(f.params))):
            h.update(x.contiguous().numpy().tobytes())
    return h.hexdigest()


SAMPLE = """
import torch; torch.set_num_threads(1)
from test_domains import digest, people, mono, multi, shifted, held_out
crowds = [people(make(24), 3) for make in (mono, multi, shifted)]
print(digest([c[i][k] for c in crowds for k in (7,2) for i in (2,0)]), digest([t.target for t in held_out('multi', 24)[::9]]))
"""


def test_another_process_paints_the_same():
    done = subprocess.run(
        [sys.executable, '-c', SAMPLE], capture_output=True, text=True, cwd=ROOT / 'tests'
    )
    assert done.returncode == 0, done.stderr
    crowds = [people(make(24), 3) for make in ALL]
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = (
            digest([c[i][k] for c in crowds for k in (7, 2) for i in (2, 0)]),
            digest([t.target for t in held_out('multi', 24)[::9]]),
        )
    finally:
        torch.set_num_threads(n)
    assert done.stdout.split() == [*here]


@pytest.mark.parametrize('make', ALL)
def test_order_does_not_matter(make):
    a, b = people(make(24), 4), people(make(24), 4)
    places = [(i, k) for i in range(4) for k in (0, 3, 8)]
    forward = {p: digest([a[p[0]][p[1]]]) for p in places}
    torch.rand(5)
    domains._person.cache_clear()
    assert all(digest([b[i][k]]) == forward[i, k] for i, k in reversed(places))
    assert len(set(forward.values())) == len(places)


def test_global_seed_is_not_touched():
    torch.manual_seed(0)
    a = torch.rand(3)
    torch.manual_seed(0)
    people(shifted(24), 1)[0][0]
    held_out('multi', 16)
    assert torch.equal(torch.rand(3), a)


def test_people_differ_by_seed_and_place(head):
    textures = [people(mono(), 2, seed).person(i).texture for seed in (0, 1) for i in (0, 1)]
    assert all((a - b).abs().mean() > 0.01 for k, a in enumerate(textures) for b in textures[:k])


def test_identity_is_the_persons_alone(head):
    """Whatever a domain does, the same seed is the same person; nothing about who it is comes from
    the clip."""
    calm = people(mono(24), 2)
    wild = people(
        mono(
            48,
            instants=3,
            lively=2.0,
            harsh=1.0,
            turn=80.0,
            tracking=5.0,
            grain=0.1,
            creases=0.0,
        ),
        2,
    )
    a, b = calm.person(1), wild.person(1)
    assert a.look.age == b.look.age
    assert a.style == b.style
    assert all(
        torch.equal(getattr(a, k), getattr(b, k))
        for k in ('shape', 'texture', 'static_offset', 'lines', 'redness')
    )


def test_seeds_never_overlap():
    def seeds(d):
        return {
            s
            for seed in (0, 1, 2, 9999)
            for s in (*people(d, 300, seed).seeds, person_seed(d.block, seed, 99_999))
        }

    sets = [seeds(make()) for make in ALL] + [
        set(domains._held_crowd(n, 16).seeds) for n in ('mono', 'multi', 'shifted')
    ]
    assert all(not a & b for k, a in enumerate(sets) for b in sets[:k])
    assert all(len(s) > 7 for s in sets)


@pytest.mark.parametrize('make', ALL)
def test_every_draw_is_usable(make, head):
    "Drawn, not painted: every palette and style is usable."
    for i in range(300):
        look, style = domains.random_person(
            domains._draw('person', person_seed(make().block, 3, i))
        )
        for c in (look.skin, look.lips, look.hair, look.iris):
            assert c.isfinite().all() and 0 <= c.min() and c.max() <= 1
        assert style.hair in domains._CUTS
        assert 0 <= look.beard <= 1
        assert 0 <= look.volume < 0.04
        assert 0 <= style.length < 3


def test_a_crowd_is_varied():
    drawn = [
        domains.random_person(domains._draw('person', person_seed(1, 0, i))) for i in range(200)
    ]
    assert {s.hair for _, s in drawn} == set(domains._CUTS)
    assert {s.beard for _, s in drawn} >= {
        'none',
        'stubble',
        'full',
        'goatee',
        'moustache',
    }
    skin = torch.stack([l.skin.mean() for l, _ in drawn])
    assert skin.min() < 0.3
    assert skin.max() > 0.7
    assert skin.std() > 0.1
    assert all(s.beard == 'none' for l, s in drawn if s.lipstick or s.shadow)


def test_hair_stands_off_and_hangs(head):
    cast = {}
    for i in range(60):
        p = make_character(person_seed(1, 0, i), head, 96)
        cast.setdefault(p.style.hair, p)
    far = {k: p.static_offset.norm(dim=-1).max().item() for k, p in cast.items()}
    assert far['bald'] < 0.001 < far['short'] < 0.05
    assert far['afro'] > 0.015
    assert far['bob'] > 0.015
    assert far['buzz'] < 0.006
    assert max(far.values()) < 0.09
    hidden = [n for n in head.part_names if n != 'skin']
    for p in cast.values():
        assert p.static_offset.isfinite().all()
        assert p.static_offset[domains.part_verts(head, *hidden)].abs().max() < 1e-8
    face = head.masks['nose'] > 0.5
    assert all(p.static_offset[face].abs().max() < 1e-4 for p in cast.values())


def test_mono_is_one_camera_one_light(head):
    clip = people(mono(32, flicker=0.0), 3)[2].frames
    a = clip[0]
    assert len(clip) == 10
    assert [f.time for f in clip] == list(range(10))
    assert {f.camera for f in clip} == {'00'}
    assert all(torch.equal(f.viewmat, a.viewmat) and torch.equal(f.K, a.K) for f in clip)
    still = torch.stack([f.mask for f in clip]).amax(0) == 0
    assert still.sum() > 200
    assert all(
        torch.equal(f.image[still], a.image[still]) for f in clip
    )  # the background stands still
    walls = [people(mono(32, flicker=0.0), 12)[i][0].image[:3, :3].mean((0, 1)) for i in range(12)]
    assert torch.stack(walls).std(0).min() > 0.05  # and is every clip's own


@pytest.mark.parametrize('make,limit', [(mono, 35.0), (shifted, 55.0)])
def test_turns_stay_within_their_limit(make, limit, head):
    "Yaw of the face as the camera sees it."
    d = make(16, tracking=0.0)
    seen = []
    for who in people(d, 40).seeds:
        V, _ = domains._camera(d, who, 0, head)
        for t in range(d.instants):
            pose = domains._pose(d, who, t, head)
            eye = -V[:3, :3].T @ V[:3, 3] - domains.face_centre(head)
            seen.append(
                torch.atan2(eye[0], eye[2]).rad2deg().item()
                - 2 * pose['rotation'][0, 1].rad2deg().item()
            )
    assert max(map(abs, seen)) <= limit + 0.01
    assert max(seen) > 0.6 * limit
    assert min(seen) < -0.6 * limit


def test_multi_is_a_rig(head):
    d = multi(24)
    clip = people(d, 2)[1]
    assert len(clip) == len(d) == 64
    frames = [clip[d.index(2, c)] for c in range(16)]
    assert {f.time for f in frames} == {2}
    assert len({f.camera for f in frames}) == 16
    assert all(
        torch.equal(f.params[k], frames[0].params[k]) for f in frames for k in f.params
    )  # one instant, one set of parameters
    assert any(
        not torch.equal(clip[d.index(1, 0)].params[k], frames[0].params[k])
        for k in ('expr', 'rotation')
    )
    yaws = [
        torch.atan2(*(-f.viewmat[:3, :3].T @ f.viewmat[:3, 3] - domains.face_centre(head))[[0, 2]])
        .rad2deg()
        .item()
        for f in frames
    ]
    assert abs(yaws[0] + 75) < 0.1
    assert abs(yaws[-1] - 75) < 0.1
    assert yaws == sorted(yaws)


def test_nobody_leaves_the_picture():
    for make in ALL:
        crowd = people(make(32), 5, seed=4)
        for clip in crowd:
            for k in range(0, len(clip), 5):
                m = clip[k].mask
                assert 0.15 < m.mean() < 0.75
                assert 0.4 < m[10:24, 8:24].mean()


def test_parameters_carry_no_hair():
    assert all(
        set(people(make(16), 1)[0][0].params)
        == {'shape', 'expr', 'jaw', 'eyes', 'rotation', 'neck', 'translation'}
        for make in ALL
    )


def test_tracking_noise(head):
    """Its spread is as promised, the shape's error is one per person, and the painting does not
    know of it."""
    d = mono(16, 4)
    noisy = people(d, 25)
    true = people(replace(d, tracking=0.0), 25)
    errors = {k: [] for k in domains.TRACKING}
    for i in range(25):
        a, b = noisy[i].frames, true[i].frames
        assert all(
            torch.equal(f.image, g.image)
            and torch.equal(f.mask, g.mask)
            and torch.equal(f.viewmat, g.viewmat)
            for f, g in zip(a, b)
        )
        assert len({f.params['shape'].sum().item() for f in a}) == 1
        assert torch.equal(b[0].params['shape'], true.person(i).shape)
        for k in errors:
            errors[k] += [f.params[k] - g.params[k] for f, g in zip(a, b)]
    for k, e in errors.items():
        e = torch.cat(e)
        assert 0.75 < e.std() / domains.TRACKING[k] < 1.3, k
        assert e.mean().abs() < 0.25 * domains.TRACKING[k], k
    jaw = torch.cat(errors['jaw'])
    assert (
        abs(torch.corrcoef(torch.stack([jaw[:-1, 0], jaw[1:, 0]]))[0, 1]) < 0.35
    )  # a new error every instant


def test_tracking_noise_scales():
    once, twice, none = (people(mono(16, tracking=k), 1)[0][3].params for k in (1.0, 2.0, 0.0))
    for k in once:
        assert torch.allclose(twice[k] - none[k], 2 * (once[k] - none[k]), atol=1e-6)


def test_flicker():
    """Instants differ in exposure by the spread they should; the cameras of one instant nearly
    agree."""
    d = multi(16, 40, 3)
    steady = people(replace(d, flicker=0.0), 1)[0]
    live = people(replace(d, flicker=0.05), 1)[0]
    gain = torch.tensor(
        [
            [
                (
                    live[d.index(t, c)].image[0, 0].mean()
                    / steady[d.index(t, c)].image[0, 0].mean()
                ).log()
                for c in range(3)
            ]
            for t in range(40)
        ]
    )
    assert 0.035 < gain.std() < 0.075
    assert gain.std(1).mean() < 0.5 * gain.std()
    assert torch.equal(live[5].mask, steady[5].mask)


def test_grain():
    a, b = (people(mono(32, flicker=0.0, grain=g), 1)[0] for g in (0.0, 0.03))
    e = b[0].image - a[0].image
    assert 0.02 < e.std() < 0.04
    assert not torch.equal(e, b[1].image - a[1].image)
    assert b[0].image.min() >= 0
    assert b[0].image.max() <= 1


def score(head, **w):
    return head.arkit({k: float(v) for k, v in w.items()})['expr'][None]


def test_skin_creases_with_the_face(head):
    p = make_character(person_seed(1, 0, 12), head)
    where = domains.canvas(head, 192)
    still = domains.emote(p, score(head), head).texture
    assert torch.equal(still, p.texture)
    brows, smile = (
        domains.emote(p, score(head, **w), head, flush=0.0).texture
        for w in (dict(browInnerUp=1), dict(mouthSmileLeft=1, mouthSmileRight=1))
    )
    row, col = where.binding.texels.T

    def moved(t):
        return (t - p.texture).abs().amax(-1)[row, col]

    forehead = (where.where[:, 1] > 0.6) & (where.where[:, 2] > -0.2)
    cheek = (where.where[:, 1] < -0.3) & (where.where[:, 1] > -0.9) & (where.where[:, 2] > -0.4)
    assert moved(brows)[forehead].mean() > 5 * moved(brows)[cheek].mean()
    assert moved(smile)[cheek].mean() > 5 * moved(smile)[forehead].mean()
    for part in ('eye_l', 'eye_r', 'teeth_up', 'tongue'):
        assert moved(smile)[where.on(part) > 0].max() < 1e-6


def test_creases_and_blush_have_their_own_switch(head):
    p = make_character(person_seed(1, 0, 12), head)
    e = score(head, mouthSmileLeft=1, mouthSmileRight=1, browDownLeft=1, browDownRight=1)
    t = {
        k: domains.emote(p, e, head, *k).texture
        for k in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
    }
    assert torch.equal(t[0.0, 0.0], p.texture)
    assert all((t[k] - p.texture).abs().max() > 0.02 for k in list(t)[1:])
    redder = (t[0.0, 1.0] - p.texture).mean((0, 1))
    assert redder[1] < redder[0] <= 0  # a blush takes green and leaves red
    half = domains.emote(p, e, head, 0.5, 0.0).texture - p.texture
    assert half.abs().mean() < 0.7 * (t[1.0, 0.0] - p.texture).abs().mean()


def test_age_folds_more(head):
    cast = [make_character(person_seed(1, 0, i), head, 64) for i in range(40)]
    bare = [p for p in cast if p.style.beard == 'none']
    old, young = (
        [p.lines.abs().mean() for p in bare if test(p.look.age)]
        for test in (lambda a: a > 0.6, lambda a: a < 0.2)
    )
    assert sum(old) / len(old) > 1.3 * sum(young) / len(young)


@pytest.mark.parametrize('name,n,each', [('mono', 24, 2), ('multi', 8, 6), ('shifted', 16, 3)])
def test_held_out(name, n, each):
    trials = held_out(name, 16)
    again = held_out(name, 16)
    assert len(trials) == n * each
    assert trials is not again
    assert all(a.target is b.target for a, b in zip(trials, again))
    for i, t in enumerate(trials):
        assert t.person == i // each
        assert len(t.sources) == 4
        assert all(torch.equal(f.params['shape'], t.target.params['shape']) for f in t.sources)
        assert (
            len({(f.time, f.camera) for f in (*t.sources, t.target)}) == 5
        )  # five different frames
    other = torch.stack([t.target.params['shape'][0] for t in trials[::each]])
    assert torch.pdist(other).min() > 1


def test_held_out_views():
    def side(f):
        return (-f.viewmat[:3, :3].T @ f.viewmat[:3, 3])[0].item()

    trials = held_out('multi', 16)
    assert all(t.target.time not in {f.time for f in t.sources} for t in trials)
    for t in trials:
        assert min(map(side, t.sources)) < -0.2
        assert max(map(side, t.sources)) > 0.2  # sources from both sides
    assert min(side(t.target) for t in trials) < -0.5
    assert max(side(t.target) for t in trials) > 0.5

    def turn(f):
        return f.params['rotation'][0, 1].item()

    for t in held_out('mono', 16):
        assert max(map(turn, t.sources)) - min(map(turn, t.sources)) > 0.05  # sources differ


@pytest.mark.parametrize(
    'make,kw', [(mono, dict(instants=3)), (multi, dict(instants=2, cameras=3))]
)
def test_vhap_round_trip(make, kw, tmp_path, head):
    clip = people(make(32, **kw), 1)[0]
    back = read_vhap(write_vhap(clip, tmp_path / 'someone', head), head=head)
    assert len(back) == len(clip)
    for f, g in zip(clip, back):
        assert (f.time, f.camera) == (g.time, g.camera)
        assert all(torch.equal(x, g.params[k]) for k, x in f.params.items())
        assert (f.image - g.image).abs().max() < 0.5001 / 255
        assert (f.mask - g.mask).abs().max() < 0.5001 / 255
        assert torch.allclose(f.viewmat, g.viewmat, atol=1e-6)


def test_slices_are_crowds():
    crowd = people(mono(16), 6)
    part = crowd[2:5]
    assert len(part) == 3
    assert part.seeds == crowd.seeds[2:5]
    assert torch.equal(part[0][1].image, crowd[2][1].image)
    assert len(list(part)) == 3
    with pytest.raises(IndexError):
        crowd[6]
    with pytest.raises(IndexError):
        crowd[0][10]


def test_a_crowd_survives_pickling():
    import pickle

    crowd = people(mono(16), 3)
    assert torch.equal(pickle.loads(pickle.dumps(crowd))[2][4].image, crowd[2][4].image)


@pytest.mark.parametrize(
    'call,words',
    [
        (lambda: mono(0), 'size of a domain should be a whole number'),
        (lambda: mono(128, 0), 'instants of a domain'),
        (lambda: mono(64.0), 'whole number'),
        (lambda: multi(cameras=0), 'cameras should be their number'),
        (lambda: mono(cameras=()), 'pairs'),
        (lambda: mono(cameras=((1, 2, 3),)), 'pairs'),
        (lambda: mono(turn=120.0), '0 to 90 degrees'),
        (lambda: shifted(tracking=-1.0), 'tracking of a domain'),
        (lambda: mono(flicker=float('nan')), 'flicker of a domain'),
        (lambda: mono(wrinkles=1.0), "no 'wrinkles'"),
        (lambda: people('mono', 3), 'expected a Domain'),
        (lambda: people(mono(), 0), 'number of people'),
        (lambda: people(mono(), 2.5), 'number of people'),
        (lambda: people(mono(), 3, seed=-1), 'seeds 0 to 9999'),
        (lambda: people(mono(), 3, seed=10_000), 'seeds 0 to 9999'),
        (lambda: people(mono(), 100_001), 'numbered 0 to 99999'),
        (lambda: held_out('nersemble'), 'held-out sets are mono, multi, shifted'),
        (lambda: held_out('mono', 0), 'size of a domain'),
        (lambda: multi().index(0, 16), 'cameras 0 to 15'),
        (lambda: mono().index(10), 'instants 0 to 9'),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(InputError, match=words) as e:
        call()
    assert '\n' not in str(e.value)
