"""What a stranger's avatar, generator or state may hold: every mutation of a sound file is refused
in one line that names the file, and costs little."""

import copy
import json
import math
import time
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spatialavatar0 import cli
from spatialavatar0.avatar.avatar import AVATAR_FILE, AVATAR_TENSORS, load_avatar, new_avatar
from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.files import Field, check_fields
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.clips import Clip
from spatialavatar0.pictures.domains import mono, multi, people
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.stage1.generator import Generator
from spatialavatar0.stage1.schedule import laptop_schedule
from spatialavatar0.stage1.trainer import Shelf, Trainer
from spatialavatar0.stage2.loop import Refinement
from spatialavatar0.stage2.refine import RefineConfig

HEAD = open_head()


class Sound:
    "A sound file, taken apart so that a test can change one thing and write it again."

    def __init__(self, path, key):
        self.key = key
        self.tensors = load_file(path)
        with safe_open(path, 'pt') as file:
            self.meta = json.loads(file.metadata()[key])

    def changed(self, path, change):
        tensors, meta = dict(self.tensors), copy.deepcopy(self.meta)
        text = change(tensors, meta)
        text = text if isinstance(text, str) else json.dumps(meta)
        tensors = {name: x.clone().contiguous() for name, x in tensors.items()}
        save_file(tensors, path, metadata={self.key: text})
        return path


def refused(read, path):
    "The line that a reader says about a file."
    start = time.perf_counter()
    with pytest.raises(InputError) as caught:
        read(path)
    line = str(caught.value)
    assert time.perf_counter() - start < 20
    assert line.isprintable()
    assert str(path) in line
    assert len(line) < 400 + len(str(path))
    return line


# ---- changes: of tensors, of the header


def cast(name, dtype, tensors, meta):
    tensors[name] = tensors[name].to(dtype)


def fill(name, value, tensors, meta):
    tensors[name] = torch.full_like(tensors[name], value)


def put(name, place, value, tensors, meta):
    tensors[name] = tensors[name].clone()
    tensors[name][place] = value


def drop(name, tensors, meta):
    del tensors[name]


def shorten(name, tensors, meta):
    tensors[name] = tensors[name][:-1]


def flatten(name, tensors, meta):
    tensors[name] = tensors[name].flatten()[:, None, None]


def add(name, tensors, meta):
    tensors[name] = torch.zeros(3)


def say(name, value, tensors, meta):
    meta[name] = value


def hush(name, tensors, meta):
    del meta[name]


def write(text, tensors, meta):
    return text


def empty(tensors, meta):
    for name in set(AVATAR_TENSORS) - {'shape', 'static_offset'}:
        tensors[name] = tensors[name][:0]


def clear(tensors, meta):
    tensors.clear()


def nested(depth):
    x = 1
    for _ in range(depth):
        x = dict(a=x)
    return x


FLOATS = [name for name, wanted in AVATAR_TENSORS.items() if wanted.dtype == 'float32']
WHOLE = [name for name, wanted in AVATAR_TENSORS.items() if wanted.dtype == 'int64']
OTHER = dict.fromkeys(FLOATS, (torch.int64, torch.float16, torch.float64, torch.bool))
OTHER |= dict.fromkeys(WHOLE, (torch.float32, torch.int32, torch.uint8, torch.bool))
NUMBERS = dict(
    offsets=(1e30, -1e7, math.nan),
    quats=(0, 1e-30, 1e30, math.inf),
    log_scales=(1e3, 12.0, -1e3),
    logit_opacities=(1e30, -1e4),
    sh0=(1e30, -1e30, 200.0),
    bary=(1e20, 0, 2 / 3, -5.0),
    seen=(-1.0, 7.0),
    shape=(1e10,),
    static_offset=(1e6, -3.0),
    face_ids=(-1, 10**9, 2**62),
    texels=(-1, 10**6, 3),
)
ONE = dict(
    offsets=1e7, quats=math.nan, log_scales=1e3, sh0=1e30, bary=1e20, seen=1.5, face_ids=2**40
)
NOT_WHOLE = -7, 10**9, 32.0, '32', True, None, [32], math.nan, 10**400, 5
NOT_SCHEMA = '1', 1.0, True, None, -1, 0, [1], math.nan, 2, 10**400
NOT_TEXT = None, 7, [1], {}, True, 'x' * 2_000_000
DOUBLE = '{"schema": 1, "head": "a", "head": "b"}'
TEXTS = dict(
    deep='{"a":' * 10**5 + '1' + '}' * 10**5,
    deep_list='[' * 10**5 + ']' * 10**5,
    twice=DOUBLE,
    number='7',
    text='"avatar"',
    null='null',
    empty='',
    half='{"schema": 1',
    list='[]',
    control='{"schema": 1, "head": "\x1b"}',
    long_number='{"schema": 1' + '0' * 5000 + '}',
)


def mutations():
    "name -> change of an avatar's file."
    found = {}
    for name, dtypes in OTHER.items():
        found |= {f'{name} as {dtype}': partial(cast, name, dtype) for dtype in dtypes}
        found |= {f'{name} missing': partial(drop, name)}
        found |= {f'{name} of another rank': partial(flatten, name)}
    for name in ('offsets', 'texels', 'seen', 'static_offset'):
        found[f'{name} too short'] = partial(shorten, name)
    for name, values in NUMBERS.items():
        found |= {f'{name} {value:.3g}': partial(fill, name, value) for value in values}
    for name, value in ONE.items():
        found[f'one of {name}'] = partial(put, name, -1, value)
    found |= {f'resolution {str(x)[:9]}': partial(say, 'resolution', x) for x in NOT_WHOLE}
    found |= {f'schema {str(x)[:9]!r}': partial(say, 'schema', x) for x in NOT_SCHEMA}
    for name in ('head', 'head_name'):
        values = {f'{name} {str(x)[:9]!r}': partial(say, name, x) for x in NOT_TEXT}
        found |= values
    found |= {f'info {x!r}': partial(say, 'info', x) for x in (None, [], 'text', 7, True)}
    found |= {
        f'no {name}': partial(hush, name) for name in ('resolution', 'schema', 'info', 'head')
    }
    found |= {f'header: {name}': partial(write, text) for name, text in TEXTS.items()}
    found |= {'info 900 deep': partial(say, 'info', nested(900)), 'no Gaussians': empty}
    found |= {'a large title': partial(say, 'info', dict(title='x' * 2_000_000))}
    found |= {'another tensor': partial(add, 'sh_rest'), 'a rude tensor': partial(add, '\x1b[31m')}
    found |= {'another head': partial(say, 'head', '0' * 16), 'no tensors': clear}
    return found


MUTATIONS = mutations()


@pytest.fixture(scope='module')
def avatar(tmp_path_factory):
    path = tmp_path_factory.mktemp('sound') / 'a.safetensors'
    new_avatar(HEAD, 16).save(path)
    assert len(load_avatar(path, HEAD)) > 100
    return Sound(path, AVATAR_FILE.key)


@pytest.mark.parametrize('name', MUTATIONS)
def test_avatars(avatar, tmp_path, name):
    path = avatar.changed(tmp_path / 'a.safetensors', MUTATIONS[name])
    refused(partial(load_avatar, head=HEAD), path)


def test_there_are_many():
    assert len(MUTATIONS) >= 140


def test_what_is_said_names_the_thing(avatar, tmp_path):
    def said(change):
        path = avatar.changed(tmp_path / 'a.safetensors', change)
        return refused(partial(load_avatar, head=HEAD), path).split('a.safetensors', 1)[1]

    count = len(avatar.tensors['seen'])
    assert said(partial(cast, 'offsets', torch.int64)) == (
        ': offsets should be float32; got int64; make it again'
    )
    assert said(partial(fill, 'bary', 2 / 3)).startswith(
        ': each row of bary should sum to 1; row 0'
    )
    assert said(partial(put, 'quats', 5, 0)).startswith(': each row of quats should have a length')
    assert 'row 5' in said(partial(put, 'quats', 5, 0))
    assert f'seen should be ({count},); got ({count - 1},)' in said(partial(shorten, 'seen'))
    assert 'face_ids should lie in 0..9957; got -1 to -1' in said(partial(fill, 'face_ids', -1))
    assert 'two Gaussians sit on one texel' in said(partial(fill, 'texels', 3))
    assert 'update spatialavatar0' in said(partial(say, 'schema', 2))
    assert 'names something twice' in said(partial(write, DOUBLE))
    assert 'lies too deep' in said(partial(say, 'info', nested(900)))
    assert 'at most 1,048,576 are read' in said(partial(say, 'info', dict(title='x' * 2_000_000)))


def test_what_is_kept(avatar, tmp_path):
    "Names and notes that say more than this version needs do no harm."

    def more(tensors, meta):
        meta.update(colour='warm', info=dict(film='Müller\n\x1b[31m', camera=dict(size=-1)))

    loaded = load_avatar(avatar.changed(tmp_path / 'a.safetensors', more), HEAD)
    loaded.save(tmp_path / 'b.safetensors')
    assert load_avatar(tmp_path / 'b.safetensors', HEAD).info == loaded.info
    name = partial(hush, 'head_name')
    load_avatar(avatar.changed(tmp_path / 'a.safetensors', name), HEAD)


# ---- files that are no safetensors, or lie about their size


def packed(layout, data=b''):
    header = json.dumps(layout).encode()
    return len(header).to_bytes(8, 'little') + header + data


ROW = dict(dtype='F32', shape=[1], data_offsets=[0, 4])
RAW = dict(
    huge_header=(2**62).to_bytes(8, 'little') + b'{}',
    header_past_the_end=(10**6).to_bytes(8, 'little') + b'{"a": 1}',
    no_json=packed(7)[:8] + b'seven',
    deep=(10**5).to_bytes(8, 'little') + b'[' * 10**5,
    no_dtype=packed(dict(x=dict(ROW, dtype='F33')), bytes(4)),
    a_billion=packed(dict(x=dict(ROW, shape=[10**9], data_offsets=[0, 4 * 10**9])), bytes(4)),
    negative=packed(dict(x=dict(ROW, shape=[-1])), bytes(4)),
    overlapping=packed(dict(x=ROW, y=ROW), bytes(4)),
    zip=b'PK\x03\x04' * 20,
    page=b'<!DOCTYPE html><title>Sign in</title>',
    nothing=b'',
    seven=b'seven b',
)


@pytest.mark.parametrize('name', RAW)
def test_no_safetensors(tmp_path, name):
    path = tmp_path / 'a.safetensors'
    path.write_bytes(RAW[name])
    line = refused(partial(load_avatar, head=HEAD), path)
    assert 'is not a readable avatar file' in line or 'not an avatar of this kit' in line


@pytest.mark.parametrize('count', (20_000_000, 10**9))
def test_a_sparse_giant_costs_nothing(avatar, tmp_path, count):
    "A file that claims, and has, 10 or 500 GB of holes: refused by its header."
    codes, sizes = dict(float32='F32', int64='I64'), dict(float32=4, int64=8)
    layout, at = {'__metadata__': {AVATAR_FILE.key: json.dumps(avatar.meta)}}, 0
    for name, wanted in AVATAR_TENSORS.items():
        shape = [count, *avatar.tensors[name].shape[1:]]
        end = at + sizes[wanted.dtype] * math.prod(shape)
        layout[name] = dict(dtype=codes[wanted.dtype], shape=shape, data_offsets=[at, end])
        at = end
    path = tmp_path / 'a.safetensors'
    with path.open('wb') as file:
        file.write(packed(layout))
        file.truncate(file.tell() + at)
    line = refused(partial(load_avatar, head=HEAD), path)
    assert 'face_ids should have 1 to 16,777,216 rows' in line or 'not a readable avatar' in line


def test_fuzz(avatar, tmp_path):
    "Bytes of the header changed at random: read, or refused in one line."
    path = avatar.changed(tmp_path / 'a.safetensors', lambda tensors, meta: None)
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], 'little')
    random = torch.Generator().manual_seed(0)
    refusals = 0
    for _ in range(300):
        data = bytearray(good)
        for at in torch.randint(0, end, (3,), generator=random).tolist():
            data[at] = int(torch.randint(0, 256, (), generator=random))
        path.write_bytes(data)
        try:
            load_avatar(path, HEAD)
        except InputError as error:
            refusals += 1
            assert str(error).isprintable()
    assert refusals > 200


# ---- generators


SMALL = dict(unet=(8, 16), encoder=(8, 8), features=8, hidden=8, resolution=16, image_size=32)
CONFIG = {
    'image_size': (-1, 0, 10**6, 33, '64', None, 64.5, True),
    'resolution': (-16, 10**6, 17, None),
    'encoder': ([], [8] * 99, [10**9], [-8], 'deep', [[8]], None),
    'unet': ([], [10**9, 8], [0, 8], 7),
    'shells': ([], [0.01], [0, 9.0], ['skin'], [math.nan]),
    'backbone': (7, 'x' * 200, 'no_such_network', 'hf-hub:somebody/something'),
    'pool': ('deep', 7, None, '\x1b[31m'),
    'features': (10**9, 0, 8.0),
    'token': (10**9,),
    'mirror': (1, 'yes', None),
}


def configure(name, value, tensors, meta):
    meta['config'][name] = value


def generator_mutations():
    found = {}
    for name, values in CONFIG.items():
        found |= {f'{name} {str(x)[:12]!r}': partial(configure, name, x) for x in values}
    for name in ('config', 'head', 'head_name', 'info'):
        found[f'no {name}'] = partial(hush, name)
        found[f'{name} as a number'] = partial(say, name, 7)
    for dtype in (torch.float16, torch.float64, torch.int64):
        found[f'base as {dtype}'] = partial(cast, 'base', dtype)
    found |= {f'base {x:.1e}': partial(fill, 'base', x) for x in (1e30, -1e6, math.nan)}
    found |= {'no base': partial(drop, 'base'), 'base too short': partial(shorten, 'base')}
    found |= {'another tensor': partial(add, 'other'), 'no tensors': clear}
    found |= {f'schema {x!r}': partial(say, 'schema', x) for x in ('1', 2, True)}
    found |= {f'header: {name}': partial(write, TEXTS[name]) for name in ('deep', 'twice', 'half')}
    return found


GENERATORS = generator_mutations()


@pytest.fixture(scope='module')
def generator(tmp_path_factory):
    path = tmp_path_factory.mktemp('sound') / 'g.safetensors'
    Generator.from_preset('tiny', HEAD, **SMALL).save(path)
    assert Generator.from_pretrained(path, HEAD).config.unet == (8, 16)
    return Sound(path, 'spatialavatar0_generator')


@pytest.mark.parametrize('name', GENERATORS)
def test_generators(generator, tmp_path, name):
    path = generator.changed(tmp_path / 'g.safetensors', GENERATORS[name])
    refused(partial(Generator.from_pretrained, head=HEAD), path)


# ---- states


def last_line(name, value, tensors, meta):
    meta['log'][-1][name] = value


STATES = {
    'no rng': partial(drop, 'rng'),
    'rng of zeros': partial(fill, 'rng', 0),
    'rng too short': partial(shorten, 'rng'),
    'rng as numbers': partial(cast, 'rng', torch.float32),
    'no delta': partial(drop, 'delta.quats'),
    'delta as half': partial(cast, 'delta.quats', torch.float16),
    'delta as double': partial(cast, 'delta.sh0', torch.float64),
    'delta too short': partial(shorten, 'delta.sh0'),
    'delta 1e30': partial(fill, 'delta.offsets', 1e30),
    'delta nan': partial(fill, 'delta.offsets', math.nan),
    'no moment': partial(drop, 'exp_avg.sh0'),
    'no step of a moment': partial(drop, 'step.sh0'),
    'moment too short': partial(shorten, 'exp_avg.quats'),
    'negative square': partial(fill, 'exp_avg_sq.sh0', -1.0),
    'negative step': partial(fill, 'step.sh0', -3.0),
    'another tensor': partial(add, 'other'),
    'step -1': partial(say, 'step', -1),
    'step 2.0': partial(say, 'step', 2.0),
    'step as text': partial(say, 'step', '2'),
    'step true': partial(say, 'step', True),
    'step past the end': partial(say, 'step', 99),
    'step 10^400': partial(say, 'step', 10**400),
    'no step': partial(hush, 'step'),
    'log as text': partial(say, 'log', 'long'),
    'log of numbers': partial(say, 'log', [1, 2]),
    'no log': partial(hush, 'log'),
    'a line without psnr': lambda tensors, meta: meta['log'][-1].pop('psnr') and None,
    'a line of words': partial(last_line, 'loss', 'small'),
    'a line of nan': partial(last_line, 'loss', math.nan),
    'made of text': partial(say, 'made_of', 'clay'),
    'made of nothing': partial(hush, 'made_of'),
    'schema 2': partial(say, 'schema', 2),
    'header: deep': partial(write, TEXTS['deep']),
    'header: null': partial(write, 'null'),
    'no tensors': clear,
}


@pytest.fixture(scope='module')
def refinement(tmp_path_factory):
    clip = Clip(mono_clip(make_person(2), 8, 48, seed=1).frames)
    config = RefineConfig(freeze=4, aspect_from=4, keep=0)
    run = Refinement(new_avatar(HEAD, 16), clip, config, 4)
    run.step()
    run.log.append(run.log_line(0.5))
    path = tmp_path_factory.mktemp('sound') / 's.safetensors'
    run.save(path)
    run.load(path)
    return Sound(path, 'refinement'), run


@pytest.mark.parametrize('name', STATES)
def test_states_of_refinements(refinement, tmp_path, name):
    sound, run = refinement
    path = sound.changed(tmp_path / 's.safetensors', STATES[name])
    refused(run.load, path)


def last_row(name, value, tensors, meta):
    meta['rows'] = [{'loss': 0.5, name: value}]


TRAININGS = {
    'no rng': partial(drop, 'rng'),
    'rng of zeros': partial(fill, 'rng', 0),
    'no weights': partial(drop, 'weights.base'),
    'weights as half': partial(cast, 'weights.base', torch.float16),
    'weights 1e30': partial(fill, 'weights.base', 1e30),
    'weights nan': partial(fill, 'weights.mean', math.nan),
    'weights too short': partial(shorten, 'weights.base'),
    'moment too short': partial(shorten, 'exp_avg.base'),
    'moment as double': partial(cast, 'exp_avg.base', torch.float64),
    'negative square': partial(fill, 'exp_avg_sq.base', -1.0),
    'another tensor': partial(add, 'other'),
    'phase -1': partial(say, 'phase', -1),
    'phase 7': partial(say, 'phase', 7),
    'phase as text': partial(say, 'phase', 'first'),
    'step past the end': partial(say, 'step', 99),
    'step 1.0': partial(say, 'step', 1.0),
    'seconds of nan': partial(say, 'seconds', math.nan),
    'seconds as text': partial(say, 'seconds', 'long'),
    'log as text': partial(say, 'log', 'long'),
    'log of numbers': partial(say, 'log', [1, 2]),
    'rows of words': partial(last_row, 'loss', 'small'),
    'rows of nan': partial(last_row, 'loss', math.nan),
    'no rows': partial(hush, 'rows'),
    'made of nothing': partial(hush, 'made_of'),
    'schema 2': partial(say, 'schema', 2),
    'header: deep': partial(write, TEXTS['deep']),
    'no tensors': clear,
}


@pytest.fixture(scope='module')
def training(tmp_path_factory):
    generator = Generator.from_preset('tiny', HEAD, **SMALL)
    many, few = people(mono(64, instants=6), 2), people(multi(64, instants=5, cameras=5), 1)
    data = [Shelf(many, generator), Shelf(few, generator)]
    run = Trainer(generator, laptop_schedule(2, 1, 2), data)
    run.run(1, show=False)
    path = tmp_path_factory.mktemp('sound') / 's.safetensors'
    run.save(path)
    run.load(path)
    return Sound(path, 'training'), run


@pytest.mark.parametrize('name', TRAININGS)
def test_states_of_trainings(training, tmp_path, name):
    sound, run = training
    path = sound.changed(tmp_path / 's.safetensors', TRAININGS[name])
    refused(run.load, path)


# ---- the terminal


def test_control_characters_never_reach_the_terminal(avatar, tmp_path, capfd):
    rude = '\x1b[31m\x07\u202eX\r'

    def another_head(tensors, meta):
        meta.update(head='1' * 16, head_name=rude + '\n')

    folder = tmp_path / f'a {rude}'
    folder.mkdir()
    files = [
        avatar.changed(tmp_path / 'a.safetensors', another_head),
        avatar.changed(folder / 'a.safetensors', another_head),
        folder / 'none.safetensors',
        folder / 'none\n.png',
    ]
    for path in files:
        for words in (('view', path), ('build', path), ('inspect', path), ('export', path, path)):
            assert cli.main([str(word) for word in words]) != 0 or words[0] == 'inspect'
            said = ''.join(capfd.readouterr())
            assert said
            assert all(line.isprintable() for line in said.split('\n')), said


def test_fields():
    fields = dict(size=Field(int, 1, 9), names=Field(list, 0, 2, inside=Field(str, 1, 5)))
    check_fields('here', dict(size=3, names=['a', 'b'], more=1), fields)
    optional = dict(fields, more=fields['size']._replace(needed=False))
    check_fields('here', dict(size=3, names=[]), optional)
    with pytest.raises(InputError, match=r"here: names\[1\] should be text .* got ''"):
        check_fields('here', dict(size=3, names=['a', '']), fields)
