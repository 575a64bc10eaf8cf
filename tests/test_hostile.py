"""What happens to folders, files, signals and clocks by other hands than ours.

Each run that goes on ends as one that had no accident, bit for bit; each that cannot says in
one line what stands in the way, and nothing is lost.
"""

import json
import os
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest
import tiny
from test_deaths import line_of, pair
from test_processes import (  # noqa: F401
    BASE,
    Child,
    assert_same,
    command,
    has_lines,
    ran,
    settings,
    slowly,
    train_to,
    until,
    whole,
)

from ebmbook import cdrl
from ebmbook.learn import files, loop
from ebmbook.learn.files import LOCK
from ebmbook.learn.runs import load_checkpoint, open_run
from ebmbook.shell.systems import load_system


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    "A run that an accident ended after its checkpoints of steps 2 and 4."
    out = tmp_path_factory.mktemp('begun') / 'run'
    train_to(open_run('cdrl', BASE, settings(), cdrl.PRESETS[BASE], out=out), 6)
    return out


@pytest.fixture
def out(tmp_path, begun):
    return Path(shutil.copytree(begun, tmp_path / 'run'))


def checksum(out):
    "Steps and bytes of all checkpoints."
    return {path.name: path.read_bytes() for path in out.glob('checkpoint-*.pt')}


def edited(**changes):
    def spoil(out):
        path = out / 'config.json'
        head = json.loads(path.read_text())
        path.write_text(
            json.dumps(head | {k: v for k, v in changes.items() if k != 'config'})
        )
        if 'config' in changes:
            config = changes['config']
            both = head['config'] | config if isinstance(config, dict) else config
            path.write_text(json.dumps(head | dict(config=both)))

    return spoil


def encoded(kind):
    def spoil(out):
        path = out / 'config.json'
        path.write_bytes(path.read_text().encode(kind))

    return spoil


def written(name, raw, mode='wb'):
    def spoil(out):
        with open(out / name, mode) as file:
            file.write(raw)

    return spoil


def folder_at(name):
    def spoil(out):
        (out / name).unlink(missing_ok=True)
        (out / name).mkdir()

    return spoil


def windows(out):
    path = out / 'log.jsonl'
    path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n'))


def linked(out):
    "The folder lies elsewhere, and a link stands in its place."
    out.rename(out.parent / 'elsewhere')
    out.symlink_to(out.parent / 'elsewhere')


def of_another_system(out):
    system = load_system('foundations')
    cfg = tiny.settings(system, save_every=1)
    tiny.trained(tiny.bare(system, cfg), cfg, out.parent / 'other')
    for step in (1, 2):
        name = f'checkpoint-00000000{step}.pt'
        shutil.copy(out.parent / 'other' / name, out / f'checkpoint-00000000{step + 5}.pt')


MINE = dict(pid=os.getppid(), host=socket.gethostname(), born=1, since='x')
GOES_ON = {
    'a field more': edited(config=dict(nonsense=3)),
    'a mark of the byte order': encoded('utf-8-sig'),
    'ends of lines of Windows': windows,
    'zeros behind the log': written('log.jsonl', bytes(300), 'ab'),
    'half a line': written('log.jsonl', b'{"total": 7, "los', 'ab'),
    'other objects in the log': written('log.jsonl', b'{"total": true}\n[1]\n7\n', 'ab'),
    'a linked folder': linked,
    'a folder for a checkpoint': folder_at('checkpoint-000000006.pt'),
    'a dead link for a checkpoint': lambda out: (
        out / 'checkpoint-000000006.pt'
    ).symlink_to('/nonexistent'),
    'checkpoints of another system': of_another_system,
    'zeros in the lock': written(LOCK, bytes(99)),
    'a lock of other types': written(LOCK, json.dumps(MINE | dict(pid='x')).encode()),
    'a lock of a process long gone': written(LOCK, json.dumps(MINE).encode()),
}


@pytest.mark.parametrize('what', GOES_ON)
def test_goes_on(what, out, whole, tmp_path):  # noqa: F811
    kept = tiny.clock(out)
    GOES_ON[what](out)
    code, said = ran(tmp_path, command(out))
    assert code == 0, said
    assert_same(out, whole)
    assert len(kept) == 4 and tiny.went_on(out, kept)


STOPS = {
    'a rate': (edited(config=dict(lr=7.0)), 'differs in lr; choose another folder'),
    'a word for a rate': (edited(config=dict(lr='abc')), 'differs in lr; choose'),
    'a list for settings': (edited(config=[1]), 'config.json is not of a run'),
    'words for changes': (edited(changes='x'), 'config.json is not of a run'),
    'half a change': (edited(changes=[dict(step=3)]), 'config.json is not of a run'),
    'another seed': (edited(seed=3), 'differs in seed; choose another folder with out'),
    'two bytes a letter': (encoded('utf-16'), 'config.json is damaged'),
    'a folder for settings': (folder_at('config.json'), 'a folder stands where the file'),
    'a folder for the log': (
        folder_at('log.jsonl'),
        'log.jsonl (Is a directory); a folder',
    ),
    'a folder for the lock': (folder_at(LOCK), f'{LOCK} (Is a directory); a folder stands'),
    'a file for weights': (written('weights', b'x'), 'weights (File exists); the checkp'),
}


@pytest.mark.parametrize('what', STOPS)
def test_stops_in_one_line(what, out, tmp_path):
    spoil, why = STOPS[what]
    spoil(out)
    before = checksum(out)
    code, said = ran(tmp_path, command(out))
    assert code == 2 and why in line_of(said), said
    assert before.items() <= checksum(out).items() or what == 'a file for weights'
    assert load_checkpoint(out)['step'] >= 4


NAMES = [
    'with space',
    'Ümläut ß 你',
    'two\nlines',
    '-dash',
    'quo\'te"',
    'a{b}%s$HOME',
    'x/',
]


@pytest.mark.parametrize('name', NAMES)
def test_names_of_folders(name, whole, tmp_path):  # noqa: F811
    code, said = ran(tmp_path, command(f'{tmp_path}/{name}'))
    assert code == 0, said
    assert_same(tmp_path / name, whole)


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / 'dead').symlink_to(tmp_path / 'gone')
    (tmp_path / 'circle').symlink_to(tmp_path / 'circle')
    (tmp_path / 'file').write_text('mine')
    names = ['dead', 'circle', 'file', 'file/x', 'x' * 300]
    for path in [*(tmp_path / name for name in names), '/proc/x', '/dev/null/x']:
        code, said = ran(tmp_path, command(path))
        assert code == 2, said
        assert f'could not make the folder {path} (' in line_of(said)
        assert 'choose another one with out' in said and 'Errno' not in said
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize('most', [300, 3_000, 20_000, 100_000])
def test_files_that_may_not_grow(most, out, whole, tmp_path):  # noqa: F811
    "What a quota or a full disk does, at different places of a write."

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    before, kept = checksum(out), tiny.clock(out)
    code, said = ran(tmp_path, command(out), limit)
    line = line_of(said)
    assert code == 2 and 'could not write' in line and 'run again' in line, said
    assert 'inline_container' not in line
    assert checksum(out) == before
    assert ran(tmp_path, command(out))[0] == 0
    assert_same(out, whole)
    assert len(kept) == 4 and tiny.went_on(out, kept)


# --- signals


def when(what):
    "SIGTERM at a moment that a step is not."

    def ask():
        os.kill(os.getpid(), signal.SIGTERM)

    def first(real):
        return lambda *args: (ask(), time.sleep(0.05), real(*args))[2]

    def before():
        if what == 'write':
            os.fsync = first(os.fsync)
        elif what == 'finish':
            real, late = loop._Job.settle, first(loop._Job.settle)
            # not of the stage before, which has no steps here
            loop._Job.settle = lambda job, nets: (late if job.step else real)(job, nets)
        else:
            setattr(loop, what, first(getattr(loop, what)))

    return before


@pytest.mark.parametrize(
    'what,codes',
    [
        ('seed_all', {-signal.SIGTERM}),  # nothing is there to be saved
        ('load', {-signal.SIGTERM}),
        ('_step', {130}),
        ('write', {130}),
        ('finish', {130}),
        ('store_weights', {130}),
    ],
)
def test_sigterm_at_other_moments(what, codes, whole, tmp_path):  # noqa: F811
    out = tmp_path / 'run'
    code, said = ran(tmp_path, command(out), when(what))
    assert code in codes, said
    kept = tiny.clock(out)
    assert bool(kept) == (code == 130)
    if code == 130:
        assert 'run the same command again to continue' in line_of(said)
    assert ran(tmp_path, command(out))[0] == 0
    assert_same(out, whole)
    assert tiny.went_on(out, kept)


def test_nobody_reads_what_is_said(whole, tmp_path):  # noqa: F811
    out = tmp_path / 'run'

    def deaf():
        real = loop._step

        def step(job, batch):
            if job.step == 3:
                here, there = os.pipe()
                os.close(here)
                os.dup2(there, 2)
            time.sleep(0.3)
            return real(job, batch)

        loop._step = step

    ran(tmp_path, command(out), deaf)
    assert_same(out, whole)


# --- others in the folder


def test_three_at_once(whole, tmp_path):  # noqa: F811
    out = tmp_path / 'run'
    children = [
        Child(command(out), tmp_path / f'said-{i}', lambda: slowly(0.2)) for i in range(3)
    ]
    ends = [child.wait() for child in children]
    assert sorted(code for code, _ in ends) == [0, 2, 2], ends
    assert all('is in use: process' in line_of(said) for code, said in ends if code)
    assert_same(out, whole)
    lines = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    assert [line['total'] for line in lines] == list(range(1, 9))


def test_one_process_and_two(whole, tmp_path):  # noqa: F811
    out = tmp_path / 'run'
    one = Child(command(out), tmp_path / 'said', lambda: slowly(1.0))
    until(one, has_lines(out, 1))
    main, other = (child.wait(60) for child in pair(out))
    assert main[0] == 2 and f'in use: process {one.pid} on' in line_of(main[1])
    assert other[0] == 2 and 'another process of this training ended' in line_of(other[1])
    code, said = one.wait()
    assert code == 0, said
    assert_same(out, whole)


@pytest.mark.parametrize('jump', [-86_400.0, -60.0, 3_600.0])
def test_the_clock_is_set(jump, monkeypatch, tmp_path):
    "A process that trains holds its folder, whatever day it is."
    real, born = psutil.boot_time, psutil.Process.create_time
    me = os.getpid()
    with files.locked(tmp_path):
        monkeypatch.setattr(psutil, 'boot_time', lambda: real() + jump)
        monkeypatch.setattr(psutil.Process, 'create_time', lambda o: born(o) + jump)
        monkeypatch.setattr(os, 'getpid', lambda: me + 1)
        with pytest.raises(OSError, match=f'is in use: process {me}'):
            files.check_free(tmp_path)
        monkeypatch.undo()
