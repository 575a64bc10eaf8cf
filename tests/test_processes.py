"""What a person is told when something goes wrong with a run, and that nothing is lost.

Commands run in forks of this process, which has PyTorch loaded already.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from contextlib import suppress
from dataclasses import replace

import pytest
import tiny
import torch
import torch.utils.data  # before any fork
from safetensors.torch import load_file, save_file

from ebmbook import cdrl
from ebmbook.data.catalogue import load
from ebmbook.data.examples import damaged
from ebmbook.learn import loop
from ebmbook.learn.files import LOCK, append_lines
from ebmbook.learn.ledger import ledger, publish
from ebmbook.learn.loop import train
from ebmbook.learn.runs import load_checkpoint, open_run, save_checkpoint
from ebmbook.learn.step import Steps
from ebmbook.shell.cli import app
from ebmbook.shell.systems import load_nets, load_system, systems

TINY = dict(ch=8, init_ch=8, batch=8, n_steps=2, n_levels=6, warmup=0, ema=0.9)
TINY |= dict(cooldown=0.0, lr=1e-3, n_iters=8, save_every=2, log_every=1)
BASE = 'checkerboard'


def over(**changes):
    return json.dumps(TINY | changes)


def command(out, *more, preset=BASE, **changes):
    "Arguments of a training in a folder."
    line = ['train', 'cdrl', '-p', 'preset', preset, '-p', 'over', over(**changes)]
    return [*line, '--out', str(out), '--device', 'cpu', *map(str, more)]


def slowly(n=0.1):
    "Every step takes a while; what a signal meets is then a step."
    real = loop._step

    def step(job, batch):
        for _ in range(10):
            time.sleep(n / 10)
        return real(job, batch)

    loop._step = step


def shown(message, *_, **__):
    "A warning as it looks without pytest."
    sys.stderr.write(f'{message}\n')


class Child:
    "A command in a fork with a process group of its own."

    def __init__(self, args, said, before=None):
        self.said = said
        self.pid = os.fork()
        if self.pid == 0:
            self._live(args, before)
        self.code = None

    def _live(self, args, before):
        code = 1
        try:
            os.setsid()
            for kind in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                signal.signal(kind, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            file = os.open(self.said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
            warnings.showwarning = shown
            warnings.simplefilter('default')
            if before is not None:
                before()
            app(args, prog_name='ebmbook')
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):  # a test may have closed them
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def wait(self, timeout=60):
        "Exit code and what it said."
        end = time.monotonic() + timeout
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"no end after {timeout} s: {self.said.read_text()}")
            time.sleep(0.01)
        return self.code, self.said.read_text()


def ran(folder, args, before=None):
    "Run a command to its end; exit code and what it said."
    n = len(list(folder.glob('said*')))
    code, said = Child(args, folder / f'said{n}', before).wait()
    assert 'Traceback' not in said, said
    return code, said


def until(child, ready, timeout=60):
    end = time.monotonic() + timeout
    while not ready():
        assert os.waitpid(child.pid, os.WNOHANG)[0] == 0, child.said.read_text()
        assert time.monotonic() < end, child.said.read_text()
        time.sleep(0.01)


def has_lines(out, n):
    path = out / 'log.jsonl'
    return lambda: path.exists() and path.read_text().count('\n') >= n


def steps_of(out):
    return [int(p.stem[11:]) for p in sorted(out.glob('checkpoint-*.pt'))]


def weights(out):
    return load_file(out / 'weights' / 'model.safetensors')


def assert_same(out, whole):
    one, two = weights(out), weights(whole)
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    code, said = ran(folder, command(folder / 'run'))
    assert code == 0, said
    return folder / 'run'


# --- signals


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', ['SIGTERM', 'SIGINT', 'SIGHUP'])
def test_a_signal_to_the_group_saves(tmp_path, whole, kind, workers):
    out = tmp_path / 'run'
    many = dict(workers=workers, save_every=1000, log_every=1)
    child = Child(command(out, **many), tmp_path / 'said', slowly)
    until(child, has_lines(out, 2))
    os.killpg(child.pid, signal.Signals[kind])
    code, said = child.wait()
    assert code == 130 and 'Traceback' not in said, said
    step = steps_of(out)[-1]
    assert f'stopped by {kind} at step {step}' in said and 'free some space' not in said
    assert f'the checkpoint of step {step} in {out} is intact' in said
    assert 'run the same command again to continue' in said
    if kind == 'SIGTERM':
        kept = tiny.clock(out)
        code, said = ran(tmp_path, command(out, **many))
        assert code == 0, said
        assert_same(out, whole)
        assert len(kept) == step and tiny.went_on(out, kept)


def test_a_second_ctrl_c_ends_within_the_step(tmp_path):
    out = tmp_path / 'run'

    def stuck():
        real = loop._step

        def step(job, batch):
            if job.step == 1:
                (out / 'stuck').touch()
                time.sleep(60)
            return real(job, batch)

        loop._step = step

    child = Child(command(out, save_every=1), tmp_path / 'said', stuck)
    until(child, (out / 'stuck').exists)
    os.killpg(child.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(child.pid, signal.SIGINT)
    code, said = child.wait(10)
    assert code == 130 and 'Ctrl-C again stops at once' in said
    assert 'stopped at once, within a step; the checkpoint of step 1 in' in said
    assert 'run the same command again to continue' in said and 'Traceback' not in said


# --- folders


def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path):
    out = tmp_path / 'mine'
    out.mkdir()
    for name in ('thesis.tmp.docx', 'data.tmpl.csv'):
        (out / name).write_text('years of work')
    code, said = ran(tmp_path, command(out))
    assert code == 2 and 'is not empty and holds no run (data.tmpl.csv, thesis' in said
    assert 'choose an empty or a new folder with out' in said
    assert sorted(p.name for p in out.iterdir()) == ['data.tmpl.csv', 'thesis.tmp.docx']


def test_files_put_into_a_run_stay(tmp_path):
    out = tmp_path / 'run'
    assert ran(tmp_path, command(out, n_iters=1))[0] == 0
    mine = ['thesis.tmp.docx', 'checkpoint-best.pt', 'checkpoint-1.tmp', 'x.tmp12']
    for name in mine:
        (out / name).write_text('mine')
    (out / 'weights' / 'README.md').write_text('mine')
    code, said = ran(tmp_path, command(out, '--change', n_iters=8))
    assert code == 0, said
    assert {(out / name).read_text() for name in mine} == {'mine'}
    assert (out / 'weights' / 'README.md').read_text() == 'mine'


def test_two_trainings_in_one_folder(tmp_path):
    out = tmp_path / 'run'
    child = Child(command(out, n_iters=200), tmp_path / 'said', slowly)
    until(child, has_lines(out, 1))
    code, said = ran(tmp_path, command(out, n_iters=200))
    assert code == 2 and f'process {child.pid} on' in said and 'is in use' in said
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait()[0] == -signal.SIGKILL and (out / LOCK).exists()
    code, said = ran(tmp_path, command(out, '--change', n_iters=8))  # a stale lock
    assert code == 0, said
    assert not (out / LOCK).exists()


# --- checkpoints


def resumed(tmp_path, whole, spoil, **changes):
    "Spoil a stopped run, go on; exit code, what was said, the folder."
    out = tmp_path / 'run'
    run = open_run('cdrl', BASE, settings(**changes), cdrl.PRESETS[BASE], out=out)
    train_to(run, 6)
    kept = tiny.clock(out, 2)  # the checkpoint of step 4 may be the one that is spoilt
    spoil(out)
    kept = kept if b'total' in (out / 'log.jsonl').read_bytes() else []  # lost with the log
    code, said = ran(tmp_path, command(out))
    assert code or tiny.clock(out, 2) == kept
    return code, said, out


def settings(**changes):
    return replace(cdrl.PRESETS[BASE], **TINY | changes)


def train_to(run, n):
    "Train, and end by an accident before the n-th step is saved."

    def fail(step, nets):
        time.sleep(0.03)  # the times in the log are then of this training
        if step == n:
            raise SystemError

    with pytest.raises(SystemError):
        train(cdrl.SYSTEM, settings(), run, progress=False, on_step=fail)


def flip(out):
    path = sorted(out.glob('checkpoint-*.pt'))[-1]
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 64] = bytes(byte ^ 255 for byte in raw[middle : middle + 64])
    path.write_bytes(raw)


def put(name, change):
    "A checkpoint of another kind, with a later number."

    def spoil(out):
        state = load_checkpoint(out)
        change(state)
        save_checkpoint(out, name, state, keep=10)

    return spoil


@pytest.mark.parametrize(
    'spoil,why',
    [
        (flip, 'its checksum is wrong'),
        (put(7, lambda o: o['identity'].update(seed=3)), 'its seed is 3, not 0'),
        (put(7, lambda o: o['identity'].update(system='x')), 'its system is x, not cdrl'),
        (put(7, lambda o: o['identity'].update(settings='x')), 'with other settings'),
        (put(7, lambda o: o.update(stage=2)), 'step 4 of stage 3, which this one does'),
        (put(7, lambda o: o.update(step=9)), 'step 9 of stage 2, which this one does'),
        (put(7, lambda o: o['nets'].popitem()), '1 tensors are missing ('),
    ],
)
def test_a_checkpoint_that_is_wrong(tmp_path, whole, spoil, why):
    code, said, out = resumed(tmp_path, whole, spoil)
    assert code == 0 and why in said, said
    assert re.search(r'checkpoint-00000000\d.pt .*using the checkpoint before it', said)
    assert_same(out, whole)


def test_a_foreign_checkpoint_alone_is_refused(tmp_path, whole):
    other = tmp_path / 'other'
    assert ran(tmp_path, command(other, '--seed', 1, n_iters=8))[0] == 0
    out = tmp_path / 'run'
    open_run('cdrl', BASE, settings(), cdrl.PRESETS[BASE], out=out)
    name = 'checkpoint-000000008.pt'
    (out / name).write_bytes((other / name).read_bytes())
    code, said = ran(tmp_path, command(out))
    assert code == 2 and f'{name} is of another run: its seed is 1, not 0' in said
    assert 'move it to another place' in said and not (out / 'weights').exists()


def test_a_checkpoint_of_a_gpu_and_of_an_earlier_version(tmp_path, whole):
    def as_gpu(out):
        path = sorted(out.glob('checkpoint-*.pt'))[-1]
        state = load_checkpoint(out)
        del state['identity']  # as earlier versions wrote it
        state['generator'] = torch.zeros(16, dtype=torch.uint8)
        state['random']['cuda'] = [torch.zeros(16, dtype=torch.uint8)]
        torch.save(state, path)

    code, said, out = resumed(tmp_path, whole, as_gpu)
    assert code == 0 and 'of another kind of device: its draws go on from a seed' in said
    again = tmp_path / 'again'
    again.mkdir()
    assert_same(resumed(again, whole, as_gpu)[2], out)  # the seed is a fixed one


# --- logs, settings, the ledger


@pytest.mark.parametrize(
    'name,text,code,why',
    [
        ('log.jsonl', b'\x00\xffgarbage\n', 0, 'log.jsonl: a damaged line was set aside'),
        ('config.json', b'', 2, 'config.json is damaged (it is empty)'),
        ('config.json', b'{"cfg": 1}', 2, 'config.json is not of a run'),
    ],
)
def test_damaged_files_are_named(tmp_path, whole, name, text, code, why):
    got, said, out = resumed(tmp_path, whole, lambda out: (out / name).write_bytes(text))
    assert got == code and why in said, said
    if code == 2 and not text:  # the advice can be followed
        (out / name).unlink()
        assert ran(tmp_path, command(out))[0] == 0
        assert_same(out, whole)


@pytest.mark.parametrize('tail', [b'{"metric": "fi', bytes(64)], ids=['half', 'zeros'])
def test_a_ledger_cut_by_a_full_disk_is_mended(tail, tmp_path):
    path = tmp_path / 'ledger.jsonl'
    publish([dict(metric='fid', value=1.0)], path)
    path.write_bytes(path.read_bytes() + tail)
    with pytest.warns(UserWarning, match='ledger.jsonl:2 was cut off'):
        assert len(ledger(path)) == 1
    with pytest.warns(UserWarning, match='set aside in ledger.jsonl.cut'):
        publish([dict(metric='kid', value=2.0)], path)
    assert [line['metric'] for line in ledger(path)] == ['fid', 'kid']


# --- divergence


def test_weights_that_are_not_finite_are_never_good(tmp_path):
    out = tmp_path / 'run'
    code, said = ran(tmp_path, command(out, lr=1e38, n_iters=2))
    assert code == 1 and 'not finite' in said and 'no checkpoint was written yet' in said
    assert not steps_of(out) and not (out / 'weights').exists()
    # the advice can be followed in the same folder
    assert 'differs in lr' in ran(tmp_path, command(out, lr=1e-3, n_iters=2))[1]
    assert ran(tmp_path, command(out, '--change', lr=1e-3, n_iters=2))[0] == 0


def test_a_lower_rate_goes_on_in_the_same_folder(tmp_path, whole):
    run = open_run('cdrl', BASE, settings(), cdrl.PRESETS[BASE], out=tmp_path / 'run')
    train_to(run, 6)
    code, said = ran(tmp_path, command(run.folder, lr=1e-4))
    assert code == 2 and 'differs in lr' in said and '--change' in said
    assert ran(tmp_path, command(run.folder, '--change', lr=1e-4))[0] == 0
    note = json.loads((run.folder / 'config.json').read_text())['changes'][0]
    assert note['step'] == 4 and note['fields'] == {'lr': [1e-3, 1e-4]}
    saved = load_checkpoint(run.folder)['optimisers']['energy']['param_groups'][0]
    assert saved['initial_lr'] == 1e-4
    again = open_run('cdrl', BASE, settings(lr=1e-4), cdrl.PRESETS[BASE], out=run.folder)
    assert again.over['changes'] == [{'step': 4, 'lr': [1e-3, 1e-4]}]


# --- weights


def test_weights_with_other_tensors_are_refused(tmp_path, whole):
    state = weights(whole)
    for folder, kept in (('less', dict(list(state.items())[9:])), ('more', state)):
        (tmp_path / folder).mkdir()
        more = {} if folder == 'less' else {'strange': torch.ones(1)}
        save_file(kept | more, tmp_path / folder / 'model.safetensors')
        config = (whole / 'weights' / 'config.json').read_text()
        (tmp_path / folder / 'config.json').write_text(config)
    why = {'less': '9 tensors are missing', 'more': r'unknown to the networks \(strange\)'}
    for folder, text in why.items():
        with pytest.raises(ValueError, match=text) as caught:
            load_nets(cdrl.SYSTEM, str(tmp_path / folder), device='cpu')
        assert len(str(caught.value)) < 500
        with pytest.raises(ValueError, match=text):
            cdrl.Nets.from_pretrained(tmp_path / folder)


# --- data and disks


class Pictures(torch.utils.data.Dataset):
    "A data set with one damaged file, which is read in the fourth step."

    def __init__(self):
        self.whole = load(BASE)
        self.bad = list(Steps(len(self.whole), 8, 0, 0, 8))[3][0]

    def __len__(self):
        return len(self.whole)

    def __getitems__(self, idx):
        if self.bad in idx:
            raise damaged('faces/20.png', OSError('image file is truncated'))
        return self.whole.batch(idx)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_damaged_picture_ends_with_a_checkpoint(tmp_path, workers):
    def spoil():
        loop.load = lambda name: Pictures()

    out = tmp_path / 'run'
    args = command(out, save_every=100, workers=workers)
    code, said = ran(tmp_path, args, spoil)
    assert code == 2 and said.count('20.png') == 1 and 'DataLoader' not in said, said
    assert steps_of(out) == [3]


def test_a_worker_that_dies(tmp_path):
    class Deadly(Pictures):
        def __getitems__(self, idx):
            if self.bad in idx:
                time.sleep(2)  # the batches before it are trained on meanwhile
                os.kill(os.getpid(), signal.SIGKILL)
            return self.whole.batch(idx)

    def spoil():
        loop.load = lambda name: Deadly()

    out = tmp_path / 'run'
    code, said = ran(tmp_path, command(out, workers=2, save_every=100), spoil)
    assert code == 2 and 'a process that reads data ended' in said
    assert 'free some space' not in said and 'run again to continue' in said
    assert steps_of(out) == [3]


def test_a_full_disk_while_weights_are_kept(tmp_path):
    from safetensors import SafetensorError

    def full():
        def fail(self, folder):
            raise SafetensorError('I/O error: No space left on device (os error 28)')

        cdrl.Nets.save_pretrained = fail

    args = command(tmp_path / 'run', '--keep-every', 3)
    code, said = ran(tmp_path, args, full)
    assert code == 2 and 'could not write' in said and 'weights-000000003' in said
    assert 'No space left' in said and 'free some space and run again' in said
    assert steps_of(tmp_path / 'run') == [2]
    assert [p.name for p in (tmp_path / 'run').iterdir() if p.is_dir()] == []


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason="needs /dev/full")
def test_a_full_disk_while_a_line_is_written():
    with pytest.raises(OSError, match='could not write /dev/full .No space left'):
        append_lines('/dev/full', ['x'])


@pytest.mark.parametrize('name', list(systems()))
def test_every_system_loads_strictly(name):
    import importlib

    from ebmbook.learn.weights import Pretrained
    from ebmbook.shell.systems import SYSTEMS

    nets = importlib.import_module(SYSTEMS[name]).Nets
    assert issubclass(nets, Pretrained)
    assert load_system(name).name == name
