"Page 93: every row is there, and no verdict compares other arms than the paper does."

import json

import pytest

from spatialavatar0.ground.core import InputError
from spatialavatar0.judge.reproduce import aspects, effect, interval, paper, verdict

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
