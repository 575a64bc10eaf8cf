"The claims file of the book, and the rule on synthetic ledgers read from disk."

import json
import re
from pathlib import Path

import pytest

from ebmbook.learn.ledger import ledger, publish
from ebmbook.shell.claims import as_markdown, as_tally, as_text, missing, read_claims
from ebmbook.shell.claims import verdicts

ROOT = Path(__file__).resolve().parents[1]

FILE = """
- id: cooperation
  system: cdrl
  source: zhu2024dissertation
  where: Table 5.9
  statement: An initialiser lowers the FID.
  paper: {CDRL: 4.31, without: 6.47}
  metric: fid
  arms:
    full:  {preset: small}
    alone: {preset: small, over: {coop: false}}
  compare:
    - {larger: alone, smaller: full}
- id: inpainting
  system: cdrl
  source: zhu2024dissertation
  statement: Known pixels stay.
  arms:
    half: {preset: small, at: {task: inpaint}}
  compare:
    - {equal: half, to: 0.0, metric: known_error}
    - {larger: half, smaller: 0.02, metric: variety}
"""


def line(metric, value, seed, over=None, at=None, **more):
    return (
        dict(
            system='cdrl',
            preset='small',
            over=over or {},
            at=at or {},
            seed=seed,
            metric=metric,
            value=value,
            n=10,
            extractor='',
        )
        | more
    )


def pair(full, alone, **more):
    "Lines of both arms of the first claim, one seed after another."
    return [line('fid', v, s) for s, v in enumerate(full)] + [
        line('fid', v, s, {'coop': False}, **more) for s, v in enumerate(alone)
    ]


@pytest.fixture
def judge(tmp_path):
    "Write claims and ledger, return the verdicts by id."
    (tmp_path / 'claims.yaml').write_text(FILE)

    def run(lines):
        (tmp_path / 'ledger.jsonl').unlink(missing_ok=True)
        publish(lines, tmp_path / 'ledger.jsonl')
        return {
            o['id']: o
            for o in verdicts(
                read_claims(tmp_path / 'claims.yaml'), ledger(tmp_path / 'ledger.jsonl')
            )
        }

    return run


@pytest.mark.parametrize(
    'full,alone,verdict',
    [
        ([4, 4.1, 4.2], [6, 6.2, 6.5], 'reproduced'),
        ([6, 6.2, 6.5], [4, 4.1, 4.2], 'not reproduced'),  # the wrong sign, clearly
        ([4, 4.1], [6, 6.2, 6.5], 'not run'),  # two seeds on one side
        ([4, 4.1], [6, 6.2], 'not run'),
        ([], [], 'not run'),
        ([4, 4.1, 4.2], [6, 6.2, 4.1], 'inconclusive'),  # mixed signs
        (
            [4, 4, 4],
            [4.1, 4.1, 12],
            'inconclusive',
        ),  # the right sign, but within two standard errors
        ([4.1, 4.1, 12], [4, 4, 4], 'inconclusive'),
        ([4, 4, 4], [4, 4, 4], 'inconclusive'),
        ([4, 5, 6], [5, 6, 7], 'reproduced'),  # equal differences: no standard error at all
        ([4, 4.1, 4.2, 4.3, 4.2], [6, 6.2, 6.5, 6.1, 6.3], 'reproduced'),
    ],
)
def test_rule(judge, full, alone, verdict):
    got = judge(pair(full, alone))['cooperation']
    assert got['verdict'] == verdict
    assert got['seeds'] == list(range(min(len(full), len(alone))))
    assert verdict != 'not run' or f'alone has {len(alone)}' in as_text([got])


@pytest.mark.parametrize(
    'more',
    [
        dict(over={'coop': False, 'lr': 1e-3}),
        dict(at={'n_steps': 3}),
        dict(preset='large'),
        dict(system='vaebm'),
        dict(metric='kid'),
    ],
)
def test_other_measurements_do_not_count(judge, more):
    assert (
        judge(
            [o | (more if o['over'] else {}) for o in pair([4, 4.1, 4.2], [6, 6.2, 6.5])]
        )['cooperation']['verdict']
        == 'not run'
    )


def test_newest_line_of_a_seed(judge):
    old = pair([4, 4.1, 4.2], [6, 6.2, 6.5])
    assert judge(old + [line('fid', 9.0, 1)])['cooperation']['verdict'] == 'inconclusive'
    assert judge([line('fid', 9.0, 1)] + old)['cooperation']['verdict'] == 'reproduced'


def test_measured_alike(judge):
    "A FID of 10 samples is not compared with one of 20, nor across extractors."
    lines = pair([4, 4.1, 4.2], [6, 6.2, 6.5])
    got = judge(lines[:-1] + [lines[-1] | dict(n=20)])['cooperation']
    assert (
        got['verdict'] == 'not run'
        and got['seeds'] == [0, 1]
        and '1 left out' in got['comparisons'][0]['note']
    )
    assert (
        judge([o | dict(extractor='a') if o['over'] else o for o in lines])['cooperation'][
            'seeds'
        ]
        == []
    )


@pytest.mark.parametrize(
    'error,variety,verdict',
    [
        ([0, 0, 0], [0.1, 0.2, 0.1], 'reproduced'),
        ([0, 0, 1e-9], [0.1, 0.2, 0.1], 'not reproduced'),
        ([0, 0], [0.1, 0.2, 0.1], 'not run'),
        ([0, 0, 0], [0.1, 0.2, 0.01], 'inconclusive'),
        ([0, 0, 0], [0.01, 0.01, 0.01], 'not reproduced'),
        ([0, 0, 1], [0.1, 0.1], 'not reproduced'),  # the worst of the comparisons counts
    ],
)
def test_equality_and_thresholds(judge, error, variety, verdict):
    at = {'task': 'inpaint'}
    lines = [line('known_error', v, s, at=at) for s, v in enumerate(error)] + [
        line('variety', v, s, at=at) for s, v in enumerate(variety)
    ]
    assert judge(lines)['inpainting']['verdict'] == verdict


def test_rendering(judge):
    got = judge(pair([4, 4.1, 4.2], [6, 6.2, 6.5]))
    assert json.loads(json.dumps(got)) == got
    assert {'id', 'system', 'paper', 'ours', 'verdict', 'seeds'} <= got[
        'cooperation'
    ].keys()
    assert got['cooperation']['paper'] == {'CDRL': 4.31, 'without': 6.47} and got[
        'cooperation'
    ]['ours']['full']['fid']['mean'] == pytest.approx(4.1)
    text = as_text(list(got.values()))
    assert (
        'cooperation: REPRODUCED' in text
        and 'without 6.47' in text
        and '2 claims: 1 reproduced, 1 not run' in text
    )
    assert len(as_markdown(list(got.values())).splitlines()) == 4


@pytest.mark.parametrize(
    'old,new,message',
    [
        ('  metric: fid\n', '', 'which metric'),
        ('id: inpainting', 'id: cooperation', 'given twice'),
        ('{preset: small}', '{rows: small}', "unknown key 'rows'"),
        ('{preset: small}', '{over: {coop: true}}', "'preset' is missing"),
        ('smaller: full', 'smaller: ful', "no arm 'ful'"),
        ('smaller: full', 'than: full', "unknown key 'than'"),
        ('alone:', 'full:', 'given twice'),
        ('CDRL: 4.31', 'CDRL: [4.31]', 'must be a number'),
        (
            '  compare:\n    - {larger: alone, smaller: full}',
            '  compare: []',
            'at least one',
        ),
        ('- id: cooperation', '- id: 3', 'id must be text'),
        ('{equal: half, to: 0.0', '{equal: half, to: half', 'must differ'),
    ],
)
def test_refusals(tmp_path, old, new, message):
    assert old in FILE
    (tmp_path / 'claims.yaml').write_text(FILE.replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_claims(tmp_path / 'claims.yaml')


def test_the_books_claims():
    "Every claim cites a known work, names presets that exist, and can be told apart in the ledger."
    from ebmbook.shell.judging import resolve

    claims = read_claims(ROOT / 'results' / 'claims.yaml')
    known = set(
        re.findall(
            r'^@\w+\{([^,]+),',
            (ROOT / 'nbs' / 'references.bib').read_text(encoding='utf-8'),
            re.M,
        )
    )
    assert {c.source for c in claims} <= known
    assert {
        'cdrl-cooperation',
        'cdrl-noise-reduction',
        'cdrl-refined-target',
        'cdrl-steps',
        'cdrl-guidance',
        'cdrl-density',
        'cdrl-composition',
        'cdrl-inpainting',
    } <= {c.id for c in claims}
    jobs = missing(claims, [], [0])
    for job in jobs:
        resolve(job)
    assert len(
        {json.dumps([j.system, j.preset, j.over], sort_keys=True) for j in jobs}
    ) == len(jobs)


def between(path, word):
    text = (ROOT / path).read_text(encoding='utf-8')
    return text.split(f'<!-- {word}: begin -->\n')[1].split(f'\n<!-- {word}: end -->')[0]


def test_the_tables_are_those_of_today():
    "The page shows what `ebmbook claims --markdown` prints, the README `--tally`."
    found = verdicts(
        read_claims(ROOT / 'results' / 'claims.yaml'),
        ledger(ROOT / 'results' / 'ledger.jsonl'),
    )
    assert between('nbs/claims.md', 'claims') == as_markdown(found)
    assert between('README.md', 'tally') == as_tally(found)
