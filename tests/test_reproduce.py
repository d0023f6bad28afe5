"Page 93: every row is there, and no verdict compares other arms than the paper does."

import json

import pytest

from spatialavatar0.ground.core import InputError
from spatialavatar0.judge.dials import DIALS, SETTINGS, Setting, dial_rows, paper_worth, worth
from spatialavatar0.judge.differences import Point, cost, differences
from spatialavatar0.judge.reproduce import aspects, effect, interval, paper, verdict
from spatialavatar0.stage1.generator import preset
from spatialavatar0.stage2.refine import RefineConfig, paper_config

FACTS = paper()
TABLES = {table['id']: table for table in FACTS['tables']}


def test_all_rows():
    rows = [row for table in TABLES.values() for row in table['rows'].values()]
    assert len(rows) == 72
    assert all('ours' in row or row['why'] for row in rows)
    for table in TABLES.values():
        assert all(len(row['paper']) == len(table['columns']) for row in table['rows'].values())


@pytest.mark.parametrize('e', FACTS['effects'], ids=lambda e: e['name'])
def test_a_verdict_has_the_arms_of_the_paper(e):
    "Its two rows of ours are those that stand beside the paper's two."
    found = effect(e)
    table, *names = e['paper']
    beside = [TABLES[table]['rows'][name] for name in names]
    file, without, having, *keys = e['ours']
    first = [*keys[:-1], e.get('first', keys[-1])]
    mine = [[file, without, *first], [file, having, *keys]]
    same = [row.get('ours') for row in beside] == mine and not any('other' in r for r in beside)
    assert same != ('other' in e)
    assert (found['verdict'] == 'another arm') == ('other' in e)


def test_what_lacks_its_partner_is_an_error(tmp_path):
    numbers = dict(psnr=30.0, head_psnr=30.0)
    runs = [('full', 1, 0), ('full', 2, 0), ('no clamp', 1, 0)]
    rows = [dict(row=row, person=p, seed=s, held_out=numbers) for row, p, s in runs]
    (tmp_path / 'refine_128.json').write_text(json.dumps(dict(rows=rows)))
    clamp = next(e for e in FACTS['effects'] if e['name'] == 'the clamp')
    with pytest.raises(InputError, match=r'has \(person, seed\) \[\(2, 0\)\]; go on with python'):
        effect(clamp, tmp_path)


def test_three_runs_say_little():
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert verdict(1.0, mean, half) == 'not seen'


def test_longest_splats():
    found = aspects()
    assert found['all guards'][0] == 8 and found['no scale-freeze'][0] is None
    assert found['no log-scale clamp'][1] < 10 < found['no L_aspect'][1]


def apart(one, other):
    return {name for name in vars(one) if getattr(one, name) != getattr(other, name)}


def test_every_switch_has_its_point():
    "What the preset `paper` has otherwise than `ours` is on page 96, and nothing else is."
    points = [point for part in differences().values() for point in part]
    switches = apart(preset('paper'), preset('ours')) | apart(paper_config(), RefineConfig())
    assert {name for point in points for name in point.switch} == switches
    measured = [point for point in points if point.cost]
    assert {name for point in measured for name in point.switch} == switches
    for point in measured:
        mean, half, count = cost(point)
        assert abs(mean) < 10 and half > 0 and count >= 3, point.what
    with pytest.raises(InputError, match='kind should be one of'):
        Point('A.1', 'what', 'theirs', 'ours', 'why', kind='better')


def test_dials_are_whole():
    "Every person and seed has every setting; a lone run is an error."
    rows = dial_rows()
    who = {(person, seed) for _, person, seed in rows}
    assert set(rows) == {(setting, *one) for setting in SETTINGS for one in who}
    assert len({person for person, _ in who}) == 3 and len(who) == 9
    assert all(row['commit'] and row['clips'] and row['device'] for row in rows.values())
    some = {key: row for key, row in rows.items() if key[0] == Setting()}
    with pytest.raises(InputError, match='was not refined as Setting'):
        worth(some, DIALS['aspect, zoom'], 1)
    lone = {key: row for key, row in rows.items() if key[0] == Setting('aspect')}
    with pytest.raises(InputError, match="was not refined as Setting\\(without=''"):
        worth(lone, DIALS['aspect, zoom'], 1)
    assert paper_worth() == pytest.approx(dict(freeze=2.07, clamp=1.56, aspect=1.03))
