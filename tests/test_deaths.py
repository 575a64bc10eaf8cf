"""A process that is killed ends its training within a minute, in a sentence, and loses nothing.

Two processes train together, as torchrun starts them, or their data is read by workers.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import tiny
from test_parts import free_port
from test_processes import (  # noqa: F401
    Child,
    assert_same,
    command,
    has_lines,
    ran,
    slowly,
    steps_of,
    until,
    whole,
)

from ebmbook.learn.runs import load_checkpoint

LIMIT = 60  # seconds


def pair(out, *more, before=None, **changes):
    "Two processes of one training, and what they say beside its folder."
    port, children = free_port(), []
    for rank in range(2):

        def begin(rank=rank):
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
            os.environ |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            if before is not None:
                before()

        said = out.parent / f'said-{out.name}-{port}-{rank}'
        children.append(Child(command(out, *more, **changes), said, begin))
    return children


def line_of(said):
    "The one line with which a command ends."
    assert 'Traceback' not in said, said
    found = [line for line in said.splitlines() if line.startswith('ebmbook: ')]
    assert len(found) == 1, said
    return found[0]


def workers_of(child, n):
    "Processes that read data for a training, when all are there."
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found = psutil.Process(child.pid).children()
        if len(found) >= n:
            return found
        time.sleep(0.01)
    raise AssertionError(child.said.read_text())


def ends(child):
    "What a process says that ends by an accident of another one."
    began = time.monotonic()
    code, said = child.wait(LIMIT)
    assert time.monotonic() - began < LIMIT and code == 2, (code, said)
    return line_of(said)


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "A training of two processes without accidents."
    out = tmp_path_factory.mktemp('two') / 'run'
    for child in pair(out):
        code, said = child.wait()
        assert code == 0, said
    return out


@pytest.mark.parametrize('rank', [0, 1])
def test_the_other_process_ends(tmp_path, two, rank):
    out = tmp_path / 'run'
    children = pair(out, before=slowly)
    until(children[0], has_lines(out, 5))
    os.kill(children[rank].pid, signal.SIGKILL)
    line = ends(children[1 - rank])
    assert children[rank].wait()[0] == -signal.SIGKILL
    assert 'another process of this training ended' in line
    assert f'the checkpoint of step {steps_of(out)[-1]} in {out} is intact' in line
    assert line.endswith('run the same command again to continue')
    assert load_checkpoint(out)['step'] == steps_of(out)[-1]
    kept = tiny.clock(out)
    for child in pair(out):  # as it says
        code, said = child.wait()
        assert code == 0, said
    assert_same(out, two)
    assert len(kept) >= 4 and tiny.went_on(out, kept)


def test_before_there_is_a_checkpoint(tmp_path):
    out = tmp_path / 'run'
    children = pair(out, before=slowly, save_every=100)
    until(children[0], has_lines(out, 2))
    os.kill(children[1].pid, signal.SIGKILL)
    line = ends(children[0])
    children[1].wait()
    assert 'another process of this training ended' in line
    assert f'no checkpoint was written yet in {out}; run the same command again' in line


@pytest.mark.slow
def test_torchrun_ends_the_others(tmp_path):
    out = tmp_path / 'run'
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    launcher += ['--nproc_per_node', '2', '-m', 'ebmbook.shell.cli']
    line = [*launcher, *command(out, n_iters=4_000, save_every=50)]
    with open(tmp_path / 'said', 'w') as said:
        process = subprocess.Popen(line, stdout=said, stderr=said, start_new_session=True)
    try:
        end = time.monotonic() + LIMIT
        while not has_lines(out, 60)():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        below = psutil.Process(process.pid).children(recursive=True)
        rank1 = next(o for o in below if o.environ().get('RANK') == '1')
        rank1.kill()
        assert process.wait(LIMIT) != 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / 'said').read_text()
    told = [o for o in text.splitlines() if o.startswith('ebmbook: ')]
    assert len(told) == 1 and 'run the same command again to continue' in told[0], text
    assert load_checkpoint(out)['step'] == steps_of(out)[-1] >= 50


@pytest.mark.parametrize('save_every', [1, 100])
def test_a_worker_is_killed(tmp_path, whole, save_every):  # noqa: F811
    out = tmp_path / 'run'
    args = command(out, workers=2, save_every=save_every)
    child = Child(args, tmp_path / 'said', slowly)
    until(child, has_lines(out, 2))
    workers_of(child, 2)[0].kill()
    line = ends(child)
    assert 'a process that reads data ended' in line and 'run again to continue' in line
    kept = tiny.clock(out)
    saved = load_checkpoint(out) or dict(step=0)
    assert saved['step'] == max(steps_of(out), default=0) == len(kept)
    assert len(kept) >= 1 or save_every == 100  # a step that breaks off cannot be saved
    code, said = ran(tmp_path, command(out, '--change'))
    assert code == 0, said
    assert_same(out, whole)
    assert tiny.went_on(out, kept)


@pytest.mark.parametrize('rank', [0, 1])
def test_a_worker_of_one_of_two_processes_is_killed(tmp_path, two, rank):
    out = tmp_path / 'run'
    children = pair(out, before=slowly, workers=2)
    until(children[0], has_lines(out, 5))
    workers_of(children[rank], 2)[0].kill()
    lines = [ends(child) for child in children]
    assert 'a process that reads data ended' in lines[rank]
    other = lines[1 - rank]
    assert 'another process could not read' in other or 'another process of this' in other
    assert load_checkpoint(out)['step'] >= 4
    kept = tiny.clock(out)
    for child in pair(out, '--change'):
        code, said = child.wait()
        assert code == 0, said
    assert_same(out, two)
    assert len(kept) >= 4 and tiny.went_on(out, kept)
