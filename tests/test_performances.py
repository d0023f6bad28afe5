"""Performances: one take written in many ways reads the same; what cannot be read says why."""

import csv
import io
import json
import math
import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spatialavatar0.use.performances as performances
from spatialavatar0.ground.core import InputError
from spatialavatar0.head.head import open_head
from spatialavatar0.use.performances import read_arkit

NAMES = open_head().arkit_names
TURNS = 'neckYaw', 'neckPitch', 'neckRoll'
FRAMES = 75  # at 60 a second, one second ends


def acted(count=FRAMES, seed=0):
    "(T,52) weights and (T,3) turns in degrees, slowly changing."
    rng = np.random.default_rng(seed)
    waves = np.sin(np.arange(count)[:, None] / 7 + rng.uniform(0, 6, 55))
    return (0.4 + 0.35 * waves[:, :52]).round(4), (20 * waves[:, 52:]).round(2)


WEIGHTS, ANGLES = acted()


def controls(weights, angles=None):
    "What the reader should find."
    frames = [dict(zip(NAMES, row)) for row in weights]
    turns = [{}] * len(frames) if angles is None else [dict(zip(TURNS, row)) for row in angles]
    return [frame | turn for frame, turn in zip(frames, turns)]


def same(found, wanted, tol=1e-4):
    "Whether two lists of controls are alike; turns in degrees."
    assert len(found) == len(wanted)
    assert set(found[0]) == set(wanted[0])
    misses = [abs(a[name] - b[name]) for a, b in zip(found, wanted) for name in b]
    assert max(misses) < tol


def read(path, *lines):
    "A recording, and the warnings it comes with: each should hold its piece of text."
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter('always')
        found = read_arkit(path)
    texts = [str(note.message) for note in noted]
    assert len(texts) == len(lines), texts
    for line, text in zip(lines, texts):
        assert line in text
        assert '\n' not in text
    return found


# ---- the same take, written in many ways

SPELLINGS = {
    'eyeBlinkLeft': lambda name: name,
    'EyeBlinkLeft': lambda name: name[0].upper() + name[1:],
    'EyeBlink_L': lambda name: re.sub('(Left|Right)$', lambda m: '_' + m[1][0], name),
    'eye_blink_left': lambda name: re.sub('([A-Z])', r'_\1', name).lower(),
    'EYE BLINK LEFT': lambda name: re.sub('([A-Z])', r' \1', name).upper(),
    'eye-blink-left': lambda name: re.sub('([A-Z])', r'-\1', name).lower(),
    'blendShapes.EyeBlinkLeft': lambda name: 'blendShapes.' + name[0].upper() + name[1:],
    'Face.M_F00_eyeBlinkLeft': lambda name: 'Face.M_F00_' + name,
    'EYEBLINKLEFT': str.upper,
}
HEADS = 'HeadYaw', 'HeadPitch', 'HeadRoll'


def timecode(i, rate):
    return f'{15 + i // rate // 3600:02}:59:{i // rate:02}:{i % rate:02}.{i % 7:03}'


def drop_code(i):
    "Of the i-th frame of 29.97 a second, from one second before the second minute."
    number = i + 1770 + (2 if i >= 30 else 0)
    return f'00:{number // 1800:02}:{number // 30 % 60:02};{number % 30:02}'


CLOCKS = {  # how frames tell their time -> column, cell of a frame, rate
    'timecode 60': ('Timecode', lambda i: timecode(i, 60), 60),
    'timecode 30': ('timeCode', lambda i: timecode(i, 30), 30),
    'timecode 24': ('TIMECODE', lambda i: timecode(i, 24).split('.')[0], 24),
    'timecode 25': ('time code', lambda i: timecode(i, 25), 25),
    'timecode 50': ('take.Timecode', lambda i: timecode(i, 50), 50),
    'seconds': ('time', lambda i: f'{i / 30:.4f}', 30),
    'seconds of an epoch': ('timestamp', lambda i: f'{1.7e9 + i / 30:.3f}', 30),
    'milliseconds': ('timestamp_ms', lambda i: str(round(1000 * i / 25)), 25),
    'untold milliseconds': ('time', lambda i: str(round(1000 * i / 50)), 50),
    'microseconds': ('timestamp', lambda i: str(round(1e6 * i / 60)), 60),
    'clock': ('time', lambda i: f'23:59:59.{round(1000 * i / 100):03}', 100),
    'date': ('timestamp', lambda i: f'2026-11-30T23:59:01.{round(1000 * i / 120):03}Z', 120),
    'drop-frame': ('Timecode', drop_code, 30 / 1.001),
    'thousandths in a timecode': (
        'Timecode',
        lambda i: f'00:00:{i // 30:02}:{round(i % 30 / 0.03):02}.{i % 30:03}',
        30,
    ),
    'frame number and its copy': ('Timecode', lambda i: f'0:0:{i // 60}:{i % 60:02}.{i:03}', 60),
    'every second of 60': ('Timecode', lambda i: f'1:2:{i // 30}:{2 * (i % 30)}', 30),
    'a column': ('fps', lambda i: '29.97', 29.97),
}


def table_text(clock, spelling, separator, percent, degrees):
    "A take as a table."
    column, stamp, _ = CLOCKS[clock]
    names = [column, 'BlendShapeCount', *map(SPELLINGS[spelling], NAMES), *HEADS]
    weights = WEIGHTS * (100 if percent else 1)
    angles = ANGLES if degrees else np.radians(ANGLES)
    rows = [
        [stamp(i), '61', *(f'{x:.6f}' for x in (*weights[i], *angles[i]))] for i in range(FRAMES)
    ]
    if separator != ',':
        rows = [[cell.replace('.', ',') for cell in row] for row in rows]
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator='\n').writerows([names, *rows])
    return text.getvalue()


ENCODINGS = 'utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'


FORMS = st.tuples(
    st.sampled_from(list(SPELLINGS)),
    st.sampled_from(',;\t| '),
    st.booleans(),
    st.booleans(),
)


@pytest.mark.parametrize('clock', CLOCKS)
@settings(max_examples=5, deadline=None)
@given(FORMS, st.sampled_from(ENCODINGS), st.sampled_from(['\n', '\r\n']))
def test_tables_of_one_take(tmp_path_factory, clock, form, code, end):
    path = tmp_path_factory.mktemp('take', numbered=True) / 'take.csv'
    path.write_bytes(table_text(clock, *form).replace('\n', end).encode(code))
    found, fps = read(path)
    same(found, controls(WEIGHTS, ANGLES))
    assert fps == pytest.approx(CLOCKS[clock][2], abs=1e-6)


def pairs(row, name='categoryName', score='score', index='index'):
    "MediaPipe's scores of one face."
    known = [('_neutral', 1e-6), *zip(NAMES, row)]
    extra = dict(displayName='')
    return [{index: i, score: x, name: n, **extra} for i, (n, x) in enumerate(known)]


def frames_of(names, rows):
    return [dict(zip(names, row)) for row in rows]


def lam(names, rows):
    metadata = dict(fps=30.0, frame_count=len(rows), blendshape_names=names)
    frames = [dict(weights=row, time=i / 30, rotation=[]) for i, row in enumerate(rows)]
    return dict(names=names, metadata=metadata, frames=frames)


def audio2face(names, rows):
    head = dict(exportFps=30.0, trackPath='a.wav', numPoses=len(names), numFrames=len(rows))
    joints = dict(joints=['jaw', 'eyeL'], rotations=[[0.0] * 8] * len(rows))
    return head | dict(facsNames=names, weightMat=rows) | joints


def web(names, rows):
    return [
        dict(timestamp=33.3333333 * i, faceBlendshapes=[dict(categories=pairs(row), headIndex=0)])
        for i, row in enumerate(rows)
    ]


def python(names, rows):
    scores = [pairs(row, 'category_name') for row in rows]
    return [
        dict(timestamp_ms=round(1000 * i / 30), face_blendshapes=[s]) for i, s in enumerate(scores)
    ]


def by_number(names, rows):
    frames = frames_of(names, rows)
    return dict(rate='30 fps', data={str(i): frames[i] for i in reversed(range(len(rows)))})


def columns(names, rows):
    return dict(fps='30000/1000', tracks=dict(zip(names, np.array(rows).T.tolist())))


def named_columns(names, rows):
    curves = [dict(name=name, values=list(x)) for name, x in zip(names, zip(*rows))]
    return dict(clip=dict(frame_rate=30, curves=curves))


JSONS = {
    'LAM': lam,
    'Audio2Face': audio2face,
    'MediaPipe, web': web,
    'MediaPipe, Python': python,
    'a dict a frame, by number': by_number,
    'a list a name': columns,
    'curves with names': named_columns,
    'pandas, by columns': lambda names, rows: {
        'time': {str(i): i / 30 for i in range(len(rows))},
        **{name: dict(enumerate(x)) for name, x in zip(names, zip(*rows))},
    },
    'pandas, split': lambda names, rows: dict(
        columns=['time', *names],
        index=list(range(len(rows))),
        data=[[i / 30, *row] for i, row in enumerate(rows)],
    ),
    'entries': lambda names, rows: [
        dict(t=i / 30, bs=[list(pair) for pair in zip(names, row)]) for i, row in enumerate(rows)
    ],
    'short keys': lambda names, rows: [
        dict(ts=33 + 20 * i, bs=[dict(k=k, v=v) for k, v in zip(names, row)])
        for i, row in enumerate(rows)
    ],
    'a value a name': lambda names, rows: dict(
        fps=30, frames=[{k: dict(value=v) for k, v in zip(names, row)} for row in rows]
    ),
    'a list of dicts': lambda names, rows: dict(fps='30', frames=frames_of(names, rows)),
    'names and rows': lambda names, rows: dict(fps=30, names=names, frames=rows),
    'rows a name': lambda names, rows: dict(hz=30, names=names, data=np.array(rows).T.tolist()),
    'nested': lambda names, rows: dict(
        take=dict(FrameRate=dict(Numerator=30, Denominator=1)),
        data=[[dict(face=dict(blendShapes=frame))] for frame in frames_of(names, rows)],
    ),
    'seconds beside': lambda names, rows: dict(
        frames=frames_of(names, rows), timestamps=[i / 30 for i in range(len(rows))]
    ),
    'percent': lambda names, rows: dict(
        fps='30', frames=frames_of(names, (100 * np.array(rows)).tolist())
    ),
}


@pytest.mark.parametrize('form', JSONS)
@settings(max_examples=4, deadline=None)
@given(st.sampled_from(list(SPELLINGS)), st.sampled_from(ENCODINGS))
def test_jsons_of_one_take(tmp_path_factory, form, spelling, code):
    path = tmp_path_factory.mktemp('take', numbered=True) / 'take.json'
    content = JSONS[form](list(map(SPELLINGS[spelling], NAMES)), WEIGHTS.tolist())
    path.write_bytes(json.dumps(content).encode(code))
    found, fps = read(path)
    same(found, controls(WEIGHTS))
    assert fps == pytest.approx(50 if form == 'short keys' else 30)


def test_a_line_a_frame(tmp_path):
    frames = [dict(zip(NAMES, row), t=i / 24) for i, row in enumerate(WEIGHTS.tolist())]
    path = tmp_path / 'take.jsonl'
    path.write_text('\n'.join(map(json.dumps, frames)))
    found, fps = read(path)
    same(found, controls(WEIGHTS))
    assert fps == 24


# ---- rates and times


def jaw(path, times, weights=None, top=''):
    "A table of two weights whose jaw opens with time."
    weights = [t / 10 for t in times] if weights is None else weights
    rows = [f'{t:.4f},{w:.6f},0.25' for t, w in zip(times, weights)]
    path.write_text(top + 'time,jawOpen,eyeBlinkLeft\n' + '\n'.join(rows))
    return path


def opened(recording):
    return np.array([frame['jawOpen'] for frame in recording.controls])


STEADY = np.arange(90) / 30


@pytest.mark.parametrize('seed', range(5))
def test_uneven_steps_are_resampled_by_time(tmp_path, seed):
    steps = np.random.default_rng(seed).uniform(0.015, 0.055, 100)
    times = np.cumsum(steps) - steps[0]
    found = read(jaw(tmp_path / 'a.csv', times), 'its time is uneven')
    assert found.fps in (25, 30)
    even = np.arange(len(found.controls)) / found.fps
    assert abs(opened(found) - even / 10).max() < 1e-4  # a straight line stays one
    assert times[-1] - 1 / found.fps < even[-1] <= times[-1]


@pytest.mark.parametrize('first, last', [(10, 12), (40, 50)])
def test_gaps_are_filled(tmp_path, first, last):
    times = np.delete(STEADY, slice(first, last))
    found = read(jaw(tmp_path / 'a.csv', times), '1 gap in its time')
    assert found.fps == 30
    assert abs(opened(found) - STEADY / 10).max() < 1e-4


def test_long_gaps_hold_the_last_face(tmp_path):
    times = np.delete(STEADY, slice(20, 60))
    found = read(jaw(tmp_path / 'a.csv', times), 'held where longer than')
    curve = opened(found)
    assert len(curve) == 90
    assert abs(curve[20:53] - 19 / 300).max() < 1e-4
    assert abs(np.delete(curve - STEADY / 10, slice(20, 60))).max() < 1e-4


def test_gaps_in_timecodes(tmp_path):
    rows = [f'{timecode(i, 30)},{i / 100}' for i in range(75) if i not in range(33, 40)]
    (tmp_path / 'a.csv').write_text('Timecode,jawOpen\n' + '\n'.join(rows))
    found = read(tmp_path / 'a.csv', '1 gap in its Timecode')
    assert found.fps == 30
    assert abs(opened(found) - np.arange(75) / 100).max() < 1e-6


def test_a_gap_where_the_only_second_ends(tmp_path):
    rows = [f'{timecode(i, 60)},{i / 200}' for i in range(90) if i not in range(50, 70)]
    (tmp_path / 'a.csv').write_text('Timecode,jawOpen\n' + '\n'.join(rows))
    found = read(tmp_path / 'a.csv', 'no second ends', '1 gap')
    assert found.fps == 60
    assert abs(opened(found) - np.arange(90) / 200).max() < 1e-6


@pytest.mark.parametrize('separator', [',', ';', '\t', '|', ' ', '   '])
def test_one_weight(tmp_path, separator):
    (tmp_path / 'a.csv').write_text(f'time{separator}jawOpen\n0{separator}0.5\n1{separator}0.6\n')
    found = read(tmp_path / 'a.csv', 'does not tell its rate')
    assert opened(found).tolist() == [0.5, 0.6]


def test_midnight(tmp_path):
    rows = [f'{["23:59:59", "00:00:00"][i // 25]}:{i % 25:02},{i / 100}' for i in range(50)]
    (tmp_path / 'a.csv').write_text('Timecode,jawOpen\n' + '\n'.join(rows))
    found = read(tmp_path / 'a.csv')
    assert (found.fps, len(found.controls)) == (25, 50)


@pytest.mark.parametrize('count, fps', [(2, 60), (20, 60), (40, 60), (60, 60), (100, 120)])
def test_short_takes_say_what_is_assumed(tmp_path, count, fps):
    rows = [f'15:20:00:{i:02}.{i:03},0.5' for i in range(count)]
    (tmp_path / 'a.csv').write_text('Timecode,jawOpen\n' + '\n'.join(rows))
    found = read(tmp_path / 'a.csv', 'no second ends in its Timecode')
    assert (found.fps, len(found.controls)) == (fps, count)


def test_a_short_take_with_a_rate(tmp_path):
    rows = [f'15:20:00:{i:02},0.5' for i in range(20)]
    (tmp_path / 'a.csv').write_text('# fps: 30\nTimecode,jawOpen\n' + '\n'.join(rows))
    assert read(tmp_path / 'a.csv').fps == 30


def test_without_any_rate(tmp_path):
    (tmp_path / 'a.json').write_text('[{"jawOpen": 0.5}, {"jawOpen": 0.6}]')
    assert read(tmp_path / 'a.json', '60 frames a second are assumed').fps == 60


def test_rates_that_disagree(tmp_path):
    path = jaw(tmp_path / 'a.csv', STEADY, top='Frame rate;60\n')
    assert read(path, 'states 60 frames a second, its time says 30').fps == 30
    frames = [dict(jawOpen=0.5)] * 3
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(dict(fps=25, meta=dict(frameRate='50 fps'), frames=frames)))
    assert read(path, 'fps 25 and frameRate 50').fps == 25
    path.write_text('{"fps": 25, "fps": 50, "frames": [{"jawOpen": 0.5}]}')
    assert read(path, 'fps 25 and again.fps 50').fps == 25
    rows = [f'0:0:0:{i},0.5' for i in range(45)]
    path = tmp_path / 'b.csv'
    path.write_text('fps=30\nTimecode,jawOpen\n' + '\n'.join(rows))
    assert read(path, 'counts beyond the 30 frames').fps == 30


def test_frames_out_of_order_are_sorted(tmp_path):
    order = [0, 2, 1, 3, 3, *range(4, 30)]
    found = read(jaw(tmp_path / 'a.csv', STEADY[order]), 'out of order or twice')
    assert abs(opened(found) - STEADY[:30] / 10).max() < 1e-4


def test_frames_without_a_face(tmp_path):
    frames = [dict(time=i / 30, faces=[dict(jawOpen=i / 100)]) for i in range(30)]
    frames[7]['faces'] = frames[29]['faces'] = []
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(frames))
    found = read(path, 'no face in 2 of 30 frames')
    assert opened(found)[:29] == pytest.approx(np.arange(29) / 100)
    assert opened(found)[29] == 0.28
    rows = [f'{timecode(i, 30)},2,{i / 100},0.5' for i in range(40)]
    rows[8] = f'{timecode(8, 30)},0'
    (tmp_path / 'a.csv').write_text('Timecode,BlendShapeCount,jawOpen,x\n' + '\n'.join(rows))
    found = read(tmp_path / 'a.csv', '1 column without', 'no face in 1 of 40')
    assert opened(found) == pytest.approx(np.arange(40) / 100)


def test_several_faces(tmp_path):
    faces = [[dict(categoryName='jawOpen', score=x)] for x in (0.2, 0.8)]
    frames = [dict(timestamp=100 * i, face_blendshapes=faces[: 1 + i % 2]) for i in range(12)]
    (tmp_path / 'a.json').write_text(json.dumps(frames))
    found = read(tmp_path / 'a.json', 'several faces in 6 frames')
    assert (found.fps, set(opened(found))) == (10, {0.2})


# ---- units, names


def test_units_by_the_whole_take(tmp_path):
    path = tmp_path / 'a.csv'
    quiet = [0.0] * 50 + [0.4] * 3 + [70.0, 60.0, 50.0] * 9
    path.write_text('fps,jawOpen\n' + '\n'.join(f'30,{x}' for x in quiet))
    assert opened(read(path)) == pytest.approx(np.array(quiet) / 100)
    broken = [0.4] * 40 + [60.0]
    path.write_text('fps,jawOpen\n' + '\n'.join(f'30,{x}' for x in broken))
    assert opened(read(path, '1 of 41 numbers beyond')) == pytest.approx([0.4] * 40 + [1])
    path.write_text('fps,jawOpen\n30,0.5%\n30,0.4%')
    assert opened(read(path)) == pytest.approx([0.005, 0.004])
    path.write_text('fps,head yaw (deg),HeadPitch_rad\n30,3,0.1\n30,2,-0.1')
    found = read(path).controls
    assert [frame['neckYaw'] for frame in found] == [3, 2]
    assert found[0]['neckPitch'] == pytest.approx(math.degrees(0.1))


def test_loud_when_most_weights_saturate(tmp_path):
    path = tmp_path / 'a.json'
    frames = [dict(zip(NAMES, [180.0] * 52))] * 5
    path.write_text(json.dumps(dict(fps=30, frames=frames)))
    read(path, '260 of 260 numbers beyond', '260 of 260 weights')
    path.write_text(json.dumps(dict(fps=30, frames=[dict(zip(NAMES, [1.0] * 52))] * 5)))
    read(path, '260 of 260 weights that move are at their limit')


def test_names_given_twice_and_names_unknown(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_text('fps,JawOpen,jaw_open,_neutral,CTRL_a,CTRL_b,c\n30,0.1,0.9,0,1,2,3\n')
    lines = 'JawOpen and jaw_open', '3 columns without an ARKit name left out, as CTRL_a, CTRL_b'
    assert read(path, *lines).controls == [dict(jawOpen=0.1)]
    path = tmp_path / 'a.json'
    path.write_text('{"fps": 30, "frames": [{"jawOpen": 0.1, "jawOpen": 0.9}]}')
    assert read(path, 'given twice').controls == [dict(jawOpen=0.1)]
    path.write_text('{"fps": 30, "raw": [{"jawOpen": 0}, {"jawOpen": 1}], "b": [{"jawOpen": 0}]}')
    assert len(read(path, 'it holds 2 takes (raw, b): raw').controls) == 2


def test_what_lies_beside_the_weights(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_text('\tfps\tjawOpen\tnote\n0\t30\t0.1\t\n1\t30\t0.2\t\n')
    assert opened(read(path, '1 column without')).tolist() == [0.1, 0.2]
    path.write_text('fps,LeftEyelid,LeftEyeYaw,frame_index,' + 'x' * 300 + '_jawOpen\n30,1,1,0,0.5')
    assert opened(read(path, '1 column without an ARKit name left out, as LeftEyelid')) == [0.5]
    matrix = dict(rows=4, columns=4, data=[0.0] * 16)
    scores = [dict(index=0, score=0.5, categoryName='jawOpen', displayName='')]
    face = dict(categories=scores, headIndex=-1, headName='')
    marks = [[dict(x=0.1, y=0.2, z=0.3)] * 4]
    beside = dict(faceLandmarks=marks, facialTransformationMatrixes=[matrix])
    frames = [dict(beside, timestamp=40 * i, faceBlendshapes=[face]) for i in range(9)]
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(frames))
    assert read(path).fps == 25
    sound = dict(sampleRate='16 kHz', rate=dict(of=[1], what=2), samplerate=48000, video_fps='25')
    path.write_text(json.dumps(dict(audio=sound, data=[dict(jawOpen=0.5)] * 2)))
    assert read(path).fps == 25


def test_clocks_that_tell_nothing(tmp_path):
    path = tmp_path / 'a.csv'
    for cells in (['0', '0', '0'], ['0', '1', '2'], ['-', '-', '-'], ['1e-9', '2e-9', '3e-9']):
        rows = '\n'.join(f'{cell},0.5' for cell in cells)
        path.write_text(f'time_s,jawOpen\n{rows}' if '1e-9' in cells else f'time,jawOpen\n{rows}')
        found = read(path, '60 frames a second are assumed')
        assert (found.fps, len(found.controls)) == (60, 3)


# ---- what is refused


def many(count, text):
    return '[' + ','.join([text] * count) + ']'


REFUSED = {  # name -> text, piece of the error
    'film.mp4': ('', '.csv or .json'),
    'a.csv': ('', 'is empty'),
    'lines.csv': ('\n\n,,\n', 'is empty'),
    'prose.csv': ('Dear friend,\nI am well', 'found none'),
    'none.csv': ('jawOpen,mouthLeft\n', 'at least one frame'),
    'short.csv': ('jawOpen,mouthLeft\n0,0\n0\n', 'frame 1 should have 2 values; got 1'),
    'long.csv': ('jawOpen,mouthLeft\n0,0,0\n', 'frame 0 should have 2 values; got 3'),
    'word.csv': ('jawOpen,mouthLeft\n0,\x1b[31mx\n', 'frame 0: mouthLeft should be a number'),
    'nan.csv': ('jawOpen,mouthLeft\n0,0\n0,nan\n', 'frame 1: mouthLeft should be a number'),
    'hole.csv': ('jawOpen,mouthLeft\n0,\n', 'mouthLeft should be a number; got nothing'),
    'faceless.csv': ('time,jawOpen\n0,\n1,\n', 'none of its 2 frames'),
    'leap.csv': ('time,jawOpen\n0,0\n0.03,0\n0.07,0\n1e9,0\n', 'leaps by'),
    'stamp.csv': ('time,jawOpen\n0,0\nsoon,0\n', 'frame 1: its time is "soon"'),
    'quote.csv': ('jawOpen,mouthLeft\n"0,0\n', 'is not a table'),
    'wide.csv': (','.join(f'jawOpen{i}' for i in range(20_000)), 'found none'),
    'half.json': ('[{', 'is not JSON'),
    'number.json': ('3', 'found none'),
    'words.json': ('["a"]', 'found none'),
    'names.json': ('["jawOpen", "mouthLeft"]', 'found none'),
    'nameless.json': (many(3, many(52, '0.5')), 'the names of the 52 values'),
    'rows.json': ('{"names": ["jawOpen", "mouthLeft"], "rows": [[0]]}', 'should have 2 values'),
    'ragged.json': ('{"names": ["jawOpen"], "x": [{"w": [0]}, {"w": [0, 0]}]}', 'frame 1 should'),
    'uneven.json': ('{"jawOpen": [0, 0], "mouthLeft": [0]}', 'as many values'),
    'null.json': ('[{"jawOpen": 0.1, "mouthLeft": null}]', 'frame 0: mouthLeft'),
    'nan.json': ('{"fps": 30, "jawOpen": [0, NaN]}', 'frame 1: jawOpen'),
    'big.json': ('{"fps": 30, "jawOpen": [1' + 400 * '0' + ']}', 'frame 0: jawOpen'),
    'rate.json': ('{"fps": -1, "jawOpen": 0}', 'fps should be frames per second above 0'),
    'rate2.json': ('{"fps": "fast", "jawOpen": 0}', 'got fast'),
    'rate3.json': ('{"frameRate": "1e999", "jawOpen": 0}', 'got 1e999'),
    'deep.json': ('[' * 100_000, 'nested too deep'),
    'deep2.json': ('[' * 200 + '{"jawOpen": 0}' + ']' * 200, 'nested too deep'),
    'deep3.json': ('{"a":' * 900 + '0' + '}' * 900, 'nested too deep'),
    'lists.json': (many(1_100_000, '[]'), 'lists'),
    'keys.json': ('{' + ','.join(f'"{i}": 0' for i in range(300_000)) + '}', 'different names'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused_in_one_line(tmp_path, name):
    text, piece = REFUSED[name]
    path = tmp_path / name
    path.write_text(text)
    with warnings.catch_warnings(), pytest.raises(InputError) as refused:
        warnings.simplefilter('ignore')
        read_arkit(path)
    line = str(refused.value)
    assert piece in line
    assert name in line
    assert line.isprintable()
    assert len(line) < 400


def test_size_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(performances, 'MOST_BYTES', 1000)
    path = tmp_path / 'a.csv'
    path.write_text('jawOpen\n' + '0\n' * 1000)
    with pytest.raises(InputError, match='at most 1,000 were expected'):
        read_arkit(path)
    monkeypatch.setattr(performances, 'MOST_FRAMES', 100)
    path.write_text('jawOpen\n' + '0\n' * 101)
    with pytest.raises(InputError, match='more than 100 frames'):
        read_arkit(path)


def test_not_text(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_bytes(b'jawOpen\n' + bytes(range(256)))
    with pytest.raises(InputError, match='is not text'):
        read_arkit(path)
    with pytest.raises(InputError, match='no such file'):
        read_arkit(tmp_path / 'gone.csv')
    (tmp_path / 'folder.csv').mkdir()
    with pytest.raises(InputError, match='a file was expected'):
        read_arkit(tmp_path / 'folder.csv')


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(['csv', 'json', 'jsonl', 'txt']))
def test_recordings_never_crash(tmp_path_factory, data, kind):
    path = tmp_path_factory.mktemp('fuzz', numbered=True) / f'a.{kind}'
    path.write_bytes(data)
    try:
        read_arkit(path)
    except InputError:
        pass


CELLS = ['jawOpen', 'mouthLeft', 'time', 'fps', 'HeadYaw', '0', '1', '0.5', '9e9', 'nan', '', '"']
CELLS += ['00:00:01:02', '00:00:02;00', '1,5', '50%', 'x', '-1', '1e400']


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.sampled_from(CELLS), max_size=4), max_size=6), st.sampled_from(',;\t|'))
def test_any_table_is_refused_or_read(tmp_path_factory, rows, separator):
    path = tmp_path_factory.mktemp('fuzz', numbered=True) / 'a.csv'
    path.write_text('\n'.join(separator.join(row) for row in rows))
    refused_or_read(path)


KEYS = ['frames', 'names', 'fps', 'facsNames', 'weightMat', 'jawOpen', 'mouthLeft', 'time', '1']
KEYS += ['score', 'categoryName', 'head', 'yaw']
LEAVES = st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(KEYS)


def branches(inner):
    "Lists and dicts of what is inside, with keys that the reader knows."
    keys = st.sampled_from(KEYS)
    return st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.recursive(LEAVES, branches, max_leaves=30))
def test_any_json_is_refused_or_read(tmp_path_factory, content):
    path = tmp_path_factory.mktemp('fuzz', numbered=True) / 'a.json'
    path.write_text(json.dumps(content))
    refused_or_read(path)


def refused_or_read(path):
    "Whatever is read has frames within their limits, and a rate."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            motion, fps = read_arkit(path)
        except InputError as e:
            assert '\n' not in str(e)
            return
    assert motion
    assert 0 < fps <= 1000
    values = np.array([list(frame.values()) for frame in motion])
    assert np.isfinite(values).all()
    assert abs(values).max() <= 40
