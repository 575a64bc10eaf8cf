"""Files that commands read, as people have them: one line that names each, nothing written."""

import json
import os

import pytest
from typer.testing import CliRunner

from ebmbook.shell import cli
from ebmbook.shell.claims import read_ledger

CLAIMS = """
- id: cooperation
  system: cdrl
  source: zhu2024
  statement: Proposals help.
  metric: fid
  arms: {full: {preset: small}, alone: {preset: small, over: {coop: false}}}
  compare: [{larger: alone, smaller: full}]
"""
ARMS = '{full: {preset: small}, alone: {preset: small, over: {coop: false}}}'
LINE = dict(
    system='cdrl', preset='small', over={}, seed=0, metric='fid', at={}, value=4.0, n=10,
    extractor='', date='2026-01-01',
)  # fmt: skip


def without(name):
    return {key: value for key, value in LINE.items() if key != name}


def text(*lines):
    return ''.join(json.dumps(line) + '\n' for line in lines)


LEDGERS = {  # contents, and what the one line says
    'empty': ('', 'is no ledger'),
    'blanks': ('\n  \n', 'is no ledger'),
    'words': ('hello\n', 'is no ledger'),
    'YAML': ('metric: fid\nvalue: 3\n', 'is no ledger'),
    'a list': (json.dumps([LINE]), 'is no ledger'),
    'a list over lines': (json.dumps([LINE], indent=1), 'is no ledger'),
    'an object over lines': (json.dumps(LINE, indent=1), 'is no ledger'),
    'a table': ('system,metric,value\ncdrl,fid,3\n', 'is no ledger'),
    'binary': (bytes(range(256)) * 9, 'is no ledger'),
    'UTF-16': (text(LINE).encode('utf-16'), 'is no ledger'),
    'a number': ('3\n', 'is no ledger'),
    'no value': (text(without('value')), 'value must be'),
    'no seed': (text(without('seed')), 'seed must be'),
    'no system': (text(without('system')), 'system must be'),
    'no metric': (text(without('metric')), 'metric must be'),
    'no preset': (text(without('preset')), 'preset must be'),
    'no over': (text(without('over')), 'over must be a mapping'),
    'no at': (text(without('at')), 'at must be a mapping'),
    'another object': (text(dict(a=1)), 'system must be'),
    'NaN': (text(LINE | dict(value=float('nan'))), 'value must be'),
    'infinite': (text(LINE | dict(value=float('inf'))), 'value must be'),
    'a word': (text(LINE | dict(value='four')), "value must be a number, got 'four'"),
    'true': (text(LINE | dict(value=True)), 'value must be'),
    'null': (text(LINE | dict(value=None)), 'value must be a number, got nothing'),
    'values': (text(LINE | dict(value=[1.0])), 'value must be'),
    'a seed in words': (text(LINE | dict(seed='one')), 'seed must be'),
    'half a seed': (text(LINE | dict(seed=0.5)), 'seed must be'),
    'a negative seed': (text(LINE | dict(seed=-1)), 'seed must be'),
    'n in words': (text(LINE | dict(n='many')), 'n must be'),
    'extractors': (text(LINE | dict(extractor=['a'])), 'extractor must be'),
    'a day': (text(LINE | dict(date=20260101)), 'date must be'),
    'over in words': (text(LINE | dict(over='coop')), 'over must be a mapping'),
    'at of a list': (text(LINE | dict(at=[1])), 'at must be a mapping'),
    'a bad one in the middle': (
        text(LINE) + 'oops\n' + text(LINE),
        ':2 is not a ledger line',
    ),
    'a bad value at the end': (text(LINE, LINE | dict(seed=1, value='x')), 'value must be'),
}

FILES = {  # of claims
    'words': ('hello', 'must hold a list of claims'),
    'a mapping': ('id: x\n', 'must hold a list of claims'),
    'a number': ('3', 'must hold a list of claims'),
    'JSON lines': (text(LINE, LINE), 'is not a claims file'),
    'binary': (bytes(range(256)) * 9, 'is not a claims file'),
    'UTF-16': (CLAIMS.encode('utf-16'), 'is not a claims file'),
    'tabs': ('-\tid: x\n\t\tsystem: y', 'is not a claims file'),
    'a tag': ('- !!python/object:os.system x', 'is not a claims file'),
    'an alias of itself': ('&a [*a]', 'claims.yaml, entry 1'),
    'a list as a key': ('- {[1, 2]: 3}', 'claims.yaml'),
    'a mapping as a key': ('- {{a: b}: 3}', 'claims.yaml'),
    'two documents': ('--- 1\n--- 2', 'is not a claims file'),
    'deep': ('[' * 5000, 'is not a claims file'),
    'numbers': ('- 1\n- 2', 'expected a mapping, got 1'),
    'no system': (CLAIMS.replace('  system: cdrl\n', ''), "'system' is missing"),
    'arms of a list': (CLAIMS.replace(ARMS, '[1]'), 'arms must be a mapping'),
    'no comparison': (CLAIMS.replace('[{larger: alone, smaller: full}]', '[]'), 'at least one'),
    'an unknown arm': (CLAIMS.replace('larger: alone', 'larger: lonely'), "no arm 'lonely'"),
    'a number that is none': (CLAIMS.replace('larger: alone', 'larger: .nan'), 'larger'),
    'an infinite number': (CLAIMS.replace('larger: alone', 'larger: .inf'), 'larger'),
    'no metric': (CLAIMS.replace('  metric: fid\n', ''), 'which metric'),
    'twice': (CLAIMS + CLAIMS, 'given twice'),
    'a metric of a list': (CLAIMS.replace('metric: fid', 'metric: [fid]'), 'metric must be text'),
    'an empty id': (CLAIMS.replace('id: cooperation', 'id: ""'), 'id must be text'),
}  # fmt: skip


def asked(tmp_path, monkeypatch, *args):
    "What a command says where nothing else lies; the files that are there afterwards."
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    found = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    lines = [line for line in found.stderr.splitlines() if line.strip()]
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    assert after == before
    return found, lines


def put(path, contents):
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


READ = [
    *((what, '') for what in LEDGERS),
    *((what, '--run') for what in ('words', 'no at')),
]


@pytest.mark.parametrize('what, run', READ)
def test_ledgers(tmp_path, monkeypatch, what, run):
    contents, says = LEDGERS[what]
    ledger = put(tmp_path / 'own.jsonl', contents)
    file = put(tmp_path / 'claims.yaml', CLAIMS)
    options = ['--file', file, '--ledger', ledger, *([run] if run else [])]
    found, lines = asked(tmp_path, monkeypatch, 'claims', *options)
    assert found.exit_code == 2 and len(lines) == 1, found.output
    assert says in lines[0] and 'own.jsonl' in lines[0] and not found.stdout


@pytest.mark.parametrize('contents', ['', '\n  \n'])
def test_a_ledger_may_begin_empty(tmp_path, contents):
    ledger = put(tmp_path / 'own.jsonl', contents)
    assert read_ledger(ledger, new=True) == []
    with pytest.raises(ValueError, match='is no ledger'):
        read_ledger(ledger)


@pytest.mark.parametrize('what', FILES)
def test_claims_files(tmp_path, monkeypatch, what):
    contents, says = FILES[what]
    file = put(tmp_path / 'claims.yaml', contents)
    found, lines = asked(tmp_path, monkeypatch, 'claims', '--file', file)
    assert found.exit_code == 2 and len(lines) == 1, found.output
    assert says in lines[0] and 'claims.yaml' in lines[0] and not found.stdout


@pytest.mark.parametrize(
    'option, says', [('--file', 'no claims file'), ('--ledger', 'no ledger')]
)
def test_what_is_no_file(tmp_path, monkeypatch, option, says):
    (tmp_path / 'folder').mkdir()
    file = put(tmp_path / 'claims.yaml', CLAIMS)
    for place in ('gone', 'folder', 'gone/gone'):
        given = {'--file': file} | {option: tmp_path / place}
        words = [word for pair in given.items() for word in pair]
        found, lines = asked(tmp_path, monkeypatch, 'claims', *words)
        assert found.exit_code == 2 and len(lines) == 1, found.output
        folder = 'is a folder' if (option, place) == ('--ledger', 'folder') else says
        assert folder in lines[0] and place in lines[0], found.output


def test_what_is_right_is_judged(tmp_path, monkeypatch):
    file = put(tmp_path / 'claims.yaml', CLAIMS)
    values = {'full': [4.0, 4.1, 4.2], 'alone': [6.0, 6.2, 6.5]}
    over = {'full': {}, 'alone': {'coop': False}}
    lines = [
        LINE | dict(over=over[arm], seed=seed, value=value)
        for arm, found in values.items()
        for seed, value in enumerate(found)
    ]
    old = [dict(without('preset') | line, row='small') for line in lines]
    for own in (lines, [{k: v for k, v in o.items() if k != 'preset'} for o in old]):
        ledger = put(tmp_path / 'own.jsonl', '\n' + text(*own) + '\n')
        options = ('--file', file, '--ledger', ledger, '--json')
        found, _ = asked(tmp_path, monkeypatch, 'claims', *options)
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)[0]['verdict'] == 'reproduced'


def test_a_ledger_that_cannot_be_read(tmp_path, monkeypatch):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    ledger = put(tmp_path / 'own.jsonl', text(LINE))
    ledger.chmod(0)
    found, lines = asked(tmp_path, monkeypatch, 'claims', '--ledger', ledger)
    assert found.exit_code == 2 and len(lines) == 1
