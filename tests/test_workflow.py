"The workflow file: it runs where it should, may do little, and names what exists."

import re
import shlex
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / '.github/workflows').glob('*.y*ml'))
CI = ROOT / '.github/workflows/ci.yml'
HOSTS = r'pypi|pythonhosted|anaconda\.org|conda-forge|download\.pytorch|npmjs|index-url'
# programs of the runner, and those that the installation brings
SYSTEM = {'python', 'make'}


def settings():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def steps(path=CI):
    "Each step with a command, as (job, step)."
    jobs = yaml.safe_load(path.read_text('utf-8'))['jobs']
    return [(job, step) for job in jobs.values() for step in job['steps'] if 'run' in step]


def commands(path=CI):
    "Words of every command."
    lines = [line for _, step in steps(path) for line in step['run'].splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def targets():
    text = (ROOT / 'Makefile').read_text('utf-8')
    return set(re.findall(r'^([a-z][\w-]*):(?!=)', text, re.M))


def missing(words):
    "What a command names that does not exist."
    program, rest = words[0], [word for word in words[1:] if '=' not in word]
    if program == 'make':
        return [word for word in rest if word not in targets()]
    if '/' in program:
        return [] if (ROOT / program).is_file() else [program]
    paths = [w for w in rest if re.fullmatch(r'(tests|\.ci|nbs)(/[\w./-]+)?', w)]
    found = [path for path in paths if not (ROOT / path).exists()]
    known = {line.split('=')[0] for line in settings()['console_scripts'].split()}
    brought = settings()['dev_requirements'].replace('==', ' ').split()
    if program not in SYSTEM | known and program.split('_')[0] not in brought:
        found.append(program)
    extras = re.search(r'\.\[([\w,]+)\]', ' '.join(words))
    for name in extras[1].split(',') if extras else ():
        found += [] if f'{name}_requirements' in settings() else [name]
    return found


@pytest.mark.parametrize('words', commands(), ids=lambda words: ' '.join(words)[:60])
def test_what_is_named_exists(words):
    assert missing(words) == []


def test_missing_finds():
    for line, what in {
        'make VENV=x chek': ['chek'],
        'python tests/no_such.py': ['tests/no_such.py'],
        '.ci/no': ['.ci/no'],
        'pylint .': ['pylint'],
        "python -m pip install -e '.[dev,boook]'": ['boook'],
    }.items():
        assert missing(shlex.split(line)) == what


def test_systems_and_versions():
    jobs = yaml.safe_load(CI.read_text('utf-8'))['jobs']
    for name in ('test', 'wheel'):
        matrix = jobs[name]['strategy']['matrix']
        assert [o.split('-')[0] for o in matrix['os']] == ['ubuntu', 'macos', 'windows']
        assert matrix['python'] == ['3.11', '3.13'] and '3.11' == settings()['min_python']
        assert jobs[name]['runs-on'] == '${{ matrix.os }}'


@pytest.mark.parametrize('path', FILES, ids=lambda o: o.name)
def test_rights_and_limits(path):
    text = path.read_text('utf-8')
    flow = yaml.safe_load(text)
    assert flow['permissions'] == {'contents': 'read'} and 'secrets.' not in text
    assert flow['concurrency']['group'] and flow['defaults']['run']['shell'] == 'bash'
    assert not re.search(HOSTS, text)
    for job in flow['jobs'].values():
        assert 0 < job['timeout-minutes'] <= 240 and 'permissions' not in job
        for step in job['steps']:
            assert ('run' in step) != ('uses' in step)
            if 'uses' in step:
                assert re.fullmatch(r'actions/[\w-]+@v\d+', step['uses'])
            if step.get('uses', '').startswith('actions/checkout'):
                assert step['with'] == {'persist-credentials': False}


def test_every_part_is_there():
    said = [' '.join(words) for words in commands()]
    for part in ('nbdev_test', 'python -m pytest tests -q .*--cov ebmbook', 'pip wheel'):
        assert any(re.search(part, line) for line in said), part
    for _, step in steps():
        if 'make' in step['run'] and 'book' in step['run'].split():
            assert step['if'] == "runner.os == 'Linux'"
        elif step['run'].startswith('make'):
            assert step['if'] == "runner.os != 'Windows'"
    dev = settings()['dev_requirements'].split()
    assert {'pytest-cov', 'pytest-xdist'} <= set(dev)


def test_windows_checks_what_make_checks():
    "The commands of `make check`, in their order."
    text = (ROOT / 'Makefile').read_text('utf-8')
    book = re.search(r'^BOOK := (.*)$', text, re.M)[1]
    check = re.search(r'^check:.*?(?=^\S)', text, re.M | re.S)[0].replace('$(BOOK)', book)
    ours = re.findall(r'echo "\d\. [^"]*";\s*(.*?) \|\| ', check)
    ours = [line.replace('$(BIN)/', '') for line in ours]
    step = next(o for _, o in steps() if o.get('if') == "runner.os == 'Windows'")
    assert step['run'].split('\n')[:-1] == ours and len(ours) == 7
