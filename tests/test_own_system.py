"""The system of CONTRIBUTING is one file, and every command works on it."""

import hashlib
import os
import re
import sys

import pytest
from typer.testing import CliRunner

from ebmbook.learn.loop import train
from ebmbook.learn.runs import open_run, root
from ebmbook.shell import cli, systems

PAGE = (root() / 'CONTRIBUTING.md').read_text(encoding='utf-8')
SECTION = PAGE.partition('## Adding a system')[2].partition('\n## ')[0]


@pytest.fixture
def own(tmp_path, monkeypatch):
    "The example in a folder of its own, where commands are given."
    (code,) = re.findall(r'```python\n(.*?)```', SECTION, re.S)
    assert len(code.splitlines()) <= 120
    (tmp_path / 'own.py').write_text(code)
    monkeypatch.setenv('EBMBOOK_SYSTEMS', str(tmp_path / 'own.py'))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    systems._in_file.cache_clear()
    sys.modules.pop('ebmbook_systems_own', None)


def invoke(*args):
    "Status and everything that was printed."
    done = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    return done.exit_code, done.output


def digest(folder):
    return hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()


def test_every_printed_command_works(own):
    (commands,) = re.findall(r'```\n(export.*?)```', SECTION, re.S)
    first, *rest = commands.splitlines()
    assert first == 'export EBMBOOK_SYSTEMS=$PWD/own.py'
    said = {}
    for line in rest:
        words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", line)]
        assert words[0] == 'ebmbook'
        status, said[words[1]] = invoke(*words[1:])
        assert status == 0, (line, said[words[1]])
    assert 'persistent contrastive divergence' in said['presets']
    assert 'fid' in said['evaluate'] and 'iteration' in said['cost']
    assert 'floor' in said['bench'] and (own / 'samples.png').is_file()


def test_it_resumes_to_the_last_bit(own):
    system = systems.load_system('pcd')
    cfg = system.presets['digits-brief']

    def stop(step, nets):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run = open_run('pcd', 'digits-brief', cfg, cfg, out=own / 'cut', device='cpu')
        train(system, cfg, run, progress=False, on_step=stop)
    for folder in ('cut', 'whole'):
        job = ('-p', 'preset', 'digits-brief', '--out', own / folder, '--device', 'cpu')
        status, text = invoke('train', 'pcd', *job)
        assert status == 0, text
    assert digest(own / 'cut' / 'weights') == digest(own / 'whole' / 'weights')


def test_it_refuses_what_it_does_not_know(own):
    job = ('-p', 'preset', 'digits-brief', '--out', 'runs/own', '--device', 'cpu')
    assert invoke('train', 'pcd', *job)[0] == 0
    for args, words in (
        (('presets', 'pdc'), "did you mean 'pcd'"),
        (('train', 'pcd', '-p', 'preset', 'digit'), "did you mean 'digits'"),
        (('train', 'pcd', *job[:3], '-p', 'over', '{etta: 1}'), "did you mean 'eta'"),
        (('evaluate', 'pcd', '--weights', 'runs/own', '--at', '{n_step: 2}'), "'n_steps'"),
        (('evaluate', 'pcd', '--weights', 'runs/own', '--at', '{task: x}'), 'unknown task'),
        (('sample', 'pcd', '--weights', 'runs/own', '--labels', '3'), 'unconditional'),
    ):
        environment = dict(os.environ, COLUMNS='200')
        done = CliRunner().invoke(cli.app, list(map(str, args)), env=environment)
        assert done.exit_code == 2 and words in done.output, (args, done.output)
        assert 'Traceback' not in done.output
