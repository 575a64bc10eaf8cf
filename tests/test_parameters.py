"""Parameters of a chapter as papermill hands them over: refused before anything is trained."""

import json

import pytest
from chapters import ROOT, limit, papermill

from ebmbook.shell.chapters import read_parameters

WRONG = {  # what papermill makes of `-p NAME VALUE`, and what the chapter says
    'seed = "abc"': 'seed must be a whole number (at least 0)',
    'seed = 3.5': 'seed must be',
    'seed = -1': 'seed must be at least 0',
    'seed = True': 'seed must be',
    'seed = None': 'seed must be',
    'seed = [0, 1]': 'seed must be',
    'seed = 99999999999': 'no count is above',
    'dataset = 3': 'dataset must be',
    'dataset = ""': 'dataset must be not empty',
    'dataset = None': 'dataset must be',
    'preset = 3': 'preset must be',
    'preset = True': 'preset must be',
    'weights = "/nosuch"': "weights must be 'book', or '' to train",
    'weights = True': 'weights must be',
    'over = 3': 'over takes a mapping',
    'over = ["n_iters"]': 'over takes a mapping',
    'out = 3': 'out must be',
    'out = None': 'out must be',
    'out = "/dev/null"': 'is a file',
    'out = "/dev/null/x"': 'could not make the folder',
    'n = 3': "unknown parameter 'n'",
    'device = "cpu"': "unknown parameter 'device'",
    'datset = "digits"': "did you mean 'dataset'?",
    'n_iters = 10': "unknown parameter 'n_iters'",
}


def cells_of(path):
    return [
        (''.join(cell['source']), cell['metadata'].get('tags', []))
        for cell in json.loads(path.read_text())['cells']
        if cell['cell_type'] == 'code'
    ]


def chapters():
    paths = sorted((ROOT / 'nbs').glob('0*.ipynb'))
    return [path for path in paths if read_parameters(path) is not None]


@pytest.mark.parametrize('path', chapters(), ids=lambda path: path.stem)
def test_a_chapter_looks_at_its_parameters_first(path):
    texts = [text for text, _ in cells_of(path)]
    first = next(i for i, text in enumerate(texts) if 'check_parameters(globals())' in text)
    assert texts[first].startswith('check_parameters(globals())\n')
    for word in ('choose(PRESETS', 'train(', 'open_run(', 'weights ==', 'seed=seed'):
        used = [
            i for i, text in enumerate(texts) if word in text and '#| export' not in text
        ]
        assert not used or min(used) >= first, word


EVERYWHERE = ['seed = "abc"', 'over = 3', 'n = 3']  # the rest in one chapter
CASES = [
    (path, line)
    for path in chapters()
    for line in (WRONG if path.stem == '05_cdrl' else EVERYWHERE)
]


@pytest.mark.parametrize(
    'path, line', CASES, ids=lambda value: getattr(value, 'stem', value)
)
def test_wrong_parameters(path, line):
    own = next(text for text, tags in cells_of(path) if 'parameters' in tags)
    written = f'# Parameters\n{line}\n'
    there = dict(In=['', own, written])
    exec(own + '\n' + written, there)  # as papermill has it
    exec('from ebmbook.shell.chapters import check_parameters', there)
    with pytest.raises((ValueError, KeyError, OSError)) as error:
        exec('check_parameters(globals())', there)
    assert WRONG[line] in str(error.value)


@pytest.mark.parametrize('given', [('seed', 'abc'), ('n', '3')], ids=' '.join)
def test_papermill_itself_ends_in_seconds(given, tmp_path):
    code, logs, seconds = papermill('05_cdrl', tmp_path, tmp_path, '-p', *given)
    last = logs.strip().splitlines()[-1]
    assert code != 0 and given[0] in last and seconds < limit(20), logs
    assert not (tmp_path / 'runs').exists()
