"The paper's index: every place of the paper has a function, and the function names its place."

import paper_index
import pytest


def test_the_page_is_in_step():
    assert paper_index.PAGE.read_text() == paper_index.text(), 'run `python tools/paper_index.py`'


@pytest.mark.parametrize('row', paper_index.rows(), ids=paper_index.title)
def test_no_row_lacks_anything(row):
    assert not paper_index.lacks(row)


def test_every_equation_and_table_has_a_row():
    cites = {row['cite'] for row in paper_index.rows()}
    words = ' '.join(row['says'] for row in paper_index.rows())
    equations = {f'Eq. {n}' for n in range(1, 14)}
    tables = {f'Tab. {n}' for n in range(1, 10)}
    within = {f'Eq. {n}' for n in (9, 10, 11)}  # parts of A.3, in the row of Eq. 3
    assert equations | tables <= cites | within
    assert 'Eq. 9 to 11' in words


@pytest.mark.parametrize(
    'functions, wrong',
    [
        ([], 'has no function'),
        (['splats.binding.nothing'], 'there is no'),
        (['nowhere.bind_uv'], 'there is no'),
        (['ground.core.set_seed'], 'does not name'),
    ],
)
def test_what_a_row_may_lack(functions, wrong):
    (words,) = paper_index.lacks(dict(cite='Eq. 1', says='', functions=functions))
    assert wrong in words


@pytest.mark.parametrize(
    'words, is_named',
    [
        ('as in Eq. 1.', True),
        ('as in Eq. 12.', False),
        ('Eq. 1 to 3', True),
        ('Eq. 9 to 11', False),
    ],
)
def test_citations_are_read_whole(words, is_named):
    assert paper_index.cites(words, 'Eq. 1') is is_named
