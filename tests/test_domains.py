"""Domains of painted people: the same everywhere, honest noise, people that nobody trains on."""

import hashlib
import pickle
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
    sha = hashlib.sha256()
    for frame in frames:
        params = [frame.params[name] for name in sorted(frame.params)]
        for tensor in (frame.image, frame.mask, frame.viewmat, frame.K, *params):
            sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def eye(frame):
    "(3,) where the camera stands, metres."
    return -frame.viewmat[:3, :3].T @ frame.viewmat[:3, 3]


def same_params(a, b):
    "Whether two frames have the same parameters, to the bit."
    return all(torch.equal(value, b.params[name]) for name, value in a.params.items())


def sample():
    "Digests of some frames of each domain, and of some targets held out."
    crowds = [people(make(24), 3) for make in ALL]
    frames = [crowd[i][k] for crowd in crowds for k in (7, 2) for i in (2, 0)]
    return digest(frames), digest([trial.target for trial in held_out('multi', 24)[::9]])


SAMPLE = """
import torch
torch.set_num_threads(1)
from test_domains import sample
print(*sample())
"""


def test_another_process_paints_the_same():
    call = [sys.executable, '-c', SAMPLE]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT / 'tests')
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = sample()
    finally:
        torch.set_num_threads(threads)
    assert done.stdout.split() == [*here]


@pytest.mark.parametrize('make', ALL)
def test_order_does_not_matter(make):
    first, second = people(make(24), 4), people(make(24), 4)
    places = [(i, k) for i in range(4) for k in (0, 3, 8)]
    forward = {(i, k): digest([first[i][k]]) for i, k in places}
    torch.rand(5)
    domains._person.cache_clear()
    assert all(digest([second[i][k]]) == forward[i, k] for i, k in reversed(places))
    assert len(set(forward.values())) == len(places)


def test_global_seed_is_not_touched():
    torch.manual_seed(0)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    people(shifted(24), 1)[0][0]
    held_out('multi', 16)
    assert torch.equal(torch.rand(3), drawn)


def differ(textures):
    "Whether each texture differs from all before it."
    pairs = [(a, b) for k, a in enumerate(textures) for b in textures[:k]]
    return all((a - b).abs().mean() > 0.01 for a, b in pairs)


def test_people_differ_by_seed_and_place(head):
    crowds = [people(mono(), 2, seed) for seed in (0, 1)]
    assert differ([crowd.person(i).texture for crowd in crowds for i in (0, 1)])


def test_identity_is_the_persons_alone(head):
    """Whatever a domain does, the same seed is the same person; nothing about who it is comes from
    the clip."""
    loud = dict(instants=3, lively=2.0, harsh=1.0, turn=80.0, tracking=5.0, grain=0.1, creases=0.0)
    calm = people(mono(24), 2).person(1)
    wild = people(mono(48, **loud), 2).person(1)
    assert calm.look.age == wild.look.age
    assert calm.style == wild.style
    for name in ('shape', 'texture', 'static_offset', 'lines', 'redness'):
        assert torch.equal(getattr(calm, name), getattr(wild, name)), name


def all_seeds(domain):
    "Seeds of the first three hundred people of some crowds, and of the last one there can be."
    found = set()
    for seed in (0, 1, 2, 9999):
        found |= {*people(domain, 300, seed).seeds, person_seed(domain.block, seed, 99_999)}
    return found


def test_seeds_never_overlap():
    held = [set(domains._held_crowd(name, 16).seeds) for name in ('mono', 'multi', 'shifted')]
    sets = [all_seeds(make()) for make in ALL] + held
    assert all(len(seeds) > 7 for seeds in sets)
    assert len(set().union(*sets)) == sum(map(len, sets))


def drawn(block, seed, i):
    "Look and style of somebody who is not painted."
    return domains.random_person(domains._draw('person', person_seed(block, seed, i)))


@pytest.mark.parametrize('make', ALL)
def test_every_draw_is_usable(make, head):
    "Drawn, not painted: every palette and style is usable."
    for i in range(300):
        look, style = drawn(make().block, 3, i)
        for color in (look.skin, look.lips, look.hair, look.iris):
            assert color.isfinite().all() and 0 <= color.min() and color.max() <= 1
        assert style.hair in domains._CUTS
        assert 0 <= look.beard <= 1
        assert 0 <= look.volume < 0.04
        assert 0 <= style.length < 3


def test_a_crowd_is_varied():
    looks, styles = zip(*[drawn(1, 0, i) for i in range(200)])
    assert {style.hair for style in styles} == set(domains._CUTS)
    beards = {style.beard for style in styles}
    assert beards >= {'none', 'stubble', 'full', 'goatee', 'moustache'}
    skin = torch.stack([look.skin.mean() for look in looks])
    assert skin.min() < 0.3
    assert skin.max() > 0.7
    assert skin.std() > 0.1
    assert all(s.beard == 'none' for s in styles if s.lipstick or s.shadow)


def test_hair_stands_off_and_hangs(head):
    cast = {}
    for i in range(60):
        person = make_character(person_seed(1, 0, i), head, 96)
        cast.setdefault(person.style.hair, person)
    far = {cut: p.static_offset.norm(dim=-1).max().item() for cut, p in cast.items()}
    assert far['bald'] < 0.001 < far['short'] < 0.05
    assert far['afro'] > 0.015
    assert far['bob'] > 0.015
    assert far['buzz'] < 0.006
    assert max(far.values()) < 0.09
    hidden = [name for name in head.part_names if name != 'skin']
    nose = head.masks['nose'] > 0.5
    for person in cast.values():
        offset = person.static_offset
        assert offset.isfinite().all()
        assert offset[domains.part_verts(head, *hidden)].abs().max() < 1e-8
        assert offset[nose].abs().max() < 1e-4


def test_mono_is_one_camera_one_light(head):
    clip = people(mono(32, flicker=0.0), 3)[2].frames
    first = clip[0]
    assert len(clip) == 10
    assert [f.time for f in clip] == list(range(10))
    assert {f.camera for f in clip} == {'00'}
    assert all(torch.equal(f.viewmat, first.viewmat) and torch.equal(f.K, first.K) for f in clip)
    still = torch.stack([f.mask for f in clip]).amax(0) == 0
    assert still.sum() > 200
    assert all(torch.equal(f.image[still], first.image[still]) for f in clip)


def test_each_clip_has_its_own_wall():
    crowd = people(mono(32, flicker=0.0), 12)
    walls = [crowd[i][0].image[:3, :3].mean((0, 1)) for i in range(12)]
    assert torch.stack(walls).std(0).min() > 0.05


@pytest.mark.parametrize('make,limit', [(mono, 35.0), (shifted, 55.0)])
def test_turns_stay_within_their_limit(make, limit, head):
    "Yaw of the face as the camera sees it."
    domain = make(16, tracking=0.0)
    seen = []
    for who in people(domain, 40).seeds:
        viewmat, _ = domains._camera(domain, who, 0, head)
        camera = -viewmat[:3, :3].T @ viewmat[:3, 3] - domains.face_centre(head)
        aside = torch.atan2(camera[0], camera[2])
        for t in range(domain.instants):
            turn = domains._pose(domain, who, t, head)['rotation'][0, 1]
            seen.append(float(aside.rad2deg()) - 2 * float(turn.rad2deg()))
    assert max(map(abs, seen)) <= limit + 0.01
    assert max(seen) > 0.6 * limit
    assert min(seen) < -0.6 * limit


def test_multi_is_a_rig(head):
    domain = multi(24)
    clip = people(domain, 2)[1]
    assert len(clip) == len(domain) == 64
    frames = [clip[domain.index(2, camera)] for camera in range(16)]
    assert {f.time for f in frames} == {2}
    assert len({f.camera for f in frames}) == 16
    assert all(same_params(f, frames[0]) for f in frames)  # one instant, one set of parameters
    before = clip[domain.index(1, 0)]
    moving = ('expr', 'rotation')
    assert any(not torch.equal(before.params[k], frames[0].params[k]) for k in moving)
    ways = [eye(f) - domains.face_centre(head) for f in frames]
    yaws = [float(torch.atan2(way[0], way[2]).rad2deg()) for way in ways]
    assert abs(yaws[0] + 75) < 0.1
    assert abs(yaws[-1] - 75) < 0.1
    assert yaws == sorted(yaws)


def test_nobody_leaves_the_picture():
    clips = [clip for make in ALL for clip in people(make(32), 5, seed=4)]
    for mask in [clip[k].mask for clip in clips for k in range(0, len(clip), 5)]:
        assert 0.15 < mask.mean() < 0.75
        assert 0.4 < mask[10:24, 8:24].mean()


@pytest.mark.parametrize('make', ALL)
def test_parameters_carry_no_hair(make):
    names = set(people(make(16), 1)[0][0].params)
    assert names == {'shape', 'expr', 'jaw', 'eyes', 'rotation', 'neck', 'translation'}


def same_picture(a, b):
    "Whether two frames show the same, from the same camera."
    names = ('image', 'mask', 'viewmat')
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_tracking_noise(head):
    """Its spread is as promised, the shape's error is one per person, and the painting does not
    know of it."""
    domain = mono(16, 4)
    noisy = people(domain, 25)
    true = people(replace(domain, tracking=0.0), 25)
    errors = {name: [] for name in domains.TRACKING}
    for i in range(25):
        told, real = noisy[i].frames, true[i].frames
        assert all(same_picture(a, b) for a, b in zip(told, real))
        assert len({f.params['shape'].sum().item() for f in told}) == 1
        assert torch.equal(real[0].params['shape'], true.person(i).shape)
        for name, found in errors.items():
            found += [a.params[name] - b.params[name] for a, b in zip(told, real)]
    errors = {name: torch.cat(found) for name, found in errors.items()}
    for name, error in errors.items():
        assert 0.75 < error.std() / domains.TRACKING[name] < 1.3, name
        assert error.mean().abs() < 0.25 * domains.TRACKING[name], name
    jaw = errors['jaw'][:, 0]
    one_later = torch.corrcoef(torch.stack([jaw[:-1], jaw[1:]]))[0, 1]
    assert abs(one_later) < 0.35  # a new error every instant


def test_tracking_noise_scales():
    clips = [people(mono(16, tracking=amount), 1)[0] for amount in (0.0, 1.0, 2.0)]
    none, once, twice = (clip[3].params for clip in clips)
    for name in none:
        error = once[name] - none[name]
        assert torch.allclose(twice[name] - none[name], 2 * error, atol=1e-6)


def test_flicker():
    """Instants differ in exposure by the spread they should; the cameras of one instant nearly
    agree."""
    domain = multi(16, 40, 3)
    steady = people(replace(domain, flicker=0.0), 1)[0]
    live = people(replace(domain, flicker=0.05), 1)[0]

    def gain(instant, camera):
        k = domain.index(instant, camera)
        return (live[k].image[0, 0].mean() / steady[k].image[0, 0].mean()).log()

    gains = torch.tensor([[gain(t, camera) for camera in range(3)] for t in range(40)])
    assert 0.035 < gains.std() < 0.075
    assert gains.std(1).mean() < 0.5 * gains.std()
    assert torch.equal(live[5].mask, steady[5].mask)


def test_grain():
    clean, grainy = (people(mono(32, flicker=0.0, grain=g), 1)[0] for g in (0.0, 0.03))
    noise = grainy[0].image - clean[0].image
    assert 0.02 < noise.std() < 0.04
    assert not torch.equal(noise, grainy[1].image - clean[1].image)
    assert grainy[0].image.min() >= 0
    assert grainy[0].image.max() <= 1


def expression(head, **scores):
    "(1,num_expr) from ARKit scores."
    return head.arkit({name: float(score) for name, score in scores.items()})['expr'][None]


@pytest.fixture(scope='module')
def someone(head):
    return make_character(person_seed(1, 0, 12), head)


def test_skin_creases_with_the_face(head, someone):
    canvas = domains.canvas(head, 192)
    row, column = canvas.binding.texels.T

    def moved(**scores):
        texture = domains.emote(someone, expression(head, **scores), head, flush=0.0).texture
        return (texture - someone.texture).abs().amax(-1)[row, column]

    still = domains.emote(someone, expression(head), head).texture
    assert torch.equal(still, someone.texture)
    brows = moved(browInnerUp=1)
    smile = moved(mouthSmileLeft=1, mouthSmileRight=1)
    _, y, z = canvas.where.T
    forehead = (y > 0.6) & (z > -0.2)
    cheek = (y < -0.3) & (y > -0.9) & (z > -0.4)
    assert brows[forehead].mean() > 5 * brows[cheek].mean()
    assert smile[cheek].mean() > 5 * smile[forehead].mean()
    for part in ('eye_l', 'eye_r', 'teeth_up', 'tongue'):
        assert smile[canvas.on(part) > 0].max() < 1e-6


def test_creases_and_blush_have_their_own_switch(head, someone):
    scores = dict(mouthSmileLeft=1, mouthSmileRight=1, browDownLeft=1, browDownRight=1)
    expr = expression(head, **scores)

    def change(creases, flush):
        return domains.emote(someone, expr, head, creases, flush).texture - someone.texture

    assert not change(0.0, 0.0).any()
    for switches in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        assert change(*switches).abs().max() > 0.02
    redder = change(0.0, 1.0).mean((0, 1))
    assert redder[1] < redder[0] <= 0  # a blush takes green and leaves red
    assert change(0.5, 0.0).abs().mean() < 0.7 * change(1.0, 0.0).abs().mean()


def test_age_folds_more(head):
    cast = [make_character(person_seed(1, 0, i), head, 64) for i in range(40)]
    bare = [person for person in cast if person.style.beard == 'none']
    old = [person.lines.abs().mean() for person in bare if person.look.age > 0.6]
    young = [person.lines.abs().mean() for person in bare if person.look.age < 0.2]
    assert sum(old) / len(old) > 1.3 * sum(young) / len(young)


@pytest.mark.parametrize('name,n,each', [('mono', 24, 2), ('multi', 8, 6), ('shifted', 16, 3)])
def test_held_out(name, n, each):
    trials = held_out(name, 16)
    again = held_out(name, 16)
    assert len(trials) == n * each
    assert trials is not again
    assert all(a.target is b.target for a, b in zip(trials, again))
    for i, trial in enumerate(trials):
        frames = (*trial.sources, trial.target)
        shape = trial.target.params['shape']
        assert trial.person == i // each
        assert len(trial.sources) == 4
        assert all(torch.equal(f.params['shape'], shape) for f in trial.sources)
        assert len({(f.time, f.camera) for f in frames}) == 5  # five different frames
    other = torch.stack([trial.target.params['shape'][0] for trial in trials[::each]])
    assert torch.pdist(other).min() > 1


def test_held_out_views():
    "Sources from both sides; targets from far out, too."
    trials = held_out('multi', 16)
    for trial in trials:
        assert trial.target.time not in {f.time for f in trial.sources}
        sides = [eye(f)[0].item() for f in trial.sources]
        assert min(sides) < -0.2
        assert max(sides) > 0.2
    targets = [eye(trial.target)[0].item() for trial in trials]
    assert min(targets) < -0.5
    assert max(targets) > 0.5


def test_held_out_turns():
    for trial in held_out('mono', 16):
        turns = [f.params['rotation'][0, 1].item() for f in trial.sources]
        assert max(turns) - min(turns) > 0.05  # sources differ


@pytest.mark.parametrize(
    'make,sizes', [(mono, dict(instants=3)), (multi, dict(instants=2, cameras=3))]
)
def test_vhap_round_trip(make, sizes, tmp_path, head):
    clip = people(make(32, **sizes), 1)[0]
    back = read_vhap(write_vhap(clip, tmp_path / 'someone', head), head=head)
    assert len(back) == len(clip)
    for written, read in zip(clip, back):
        assert (written.time, written.camera) == (read.time, read.camera)
        assert same_params(written, read)
        assert (written.image - read.image).abs().max() < 0.5001 / 255
        assert (written.mask - read.mask).abs().max() < 0.5001 / 255
        assert torch.allclose(written.viewmat, read.viewmat, atol=1e-6)


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
    crowd = people(mono(16), 3)
    again = pickle.loads(pickle.dumps(crowd))
    assert torch.equal(again[2][4].image, crowd[2][4].image)


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
