"""Training through the public door, with real accidents.

Kills, torn files, full disks, NaNs, several processes.

Run as a script, this file is the program that gets killed: it trains a small CDRL as one JSON
argument says.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ebmbook import cdrl
from ebmbook.learn import runs
from ebmbook.learn.contract import Stage
from ebmbook.learn.loop import train
from ebmbook.learn.runs import load_checkpoint, open_run
from ebmbook.learn.settings import choose

SMALL = dict(
    ch=8,
    init_ch=8,
    batch=32,
    n_iters=60,
    save_every=10,
    log_every=1,
    warmup=0,
    lr=1e-3,
    lr_init=1e-3,
    ema=0.9,
)
DIGITS = SMALL | dict(blocks=1, init_blocks=1, n_steps=4, n_levels=3, batch=8, pretrain=0)
CURVES = 'loss/energy', 'loss/init', 'grad/energy', 'grad/init', 'gap', 'moved'


# --- the program that gets killed


def poisoned(at):  # CDRL whose energy loss is not a number at one step
    def losses(nets, batch, ctx):
        for name, loss, logs in cdrl.losses(nets, batch, ctx):
            yield (
                name,
                loss * float('nan') if ctx.step == at and name == 'energy' else loss,
                logs,
            )

    stage = Stage('cdrl', losses, cdrl.optimisers, lambda cfg: cfg.n_iters)
    return replace(cdrl.SYSTEM, stages=(stage,))


def die_while_writing(number):  # power cut with a checkpoint half written
    real, calls = os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) == number:
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        real(fd)

    os.fsync = fsync


def work(job):
    """Train as `job` says: out, over, and optionally dataset, nan_at, die_at_write, and
    sleep (seconds after each step).
    """
    preset, cfg = choose(
        cdrl.PRESETS,
        cdrl.DEFAULT_PRESET,
        job.get('dataset', 'checkerboard'),
        over=job['over'],
    )
    if 'die_at_write' in job:
        die_while_writing(job['die_at_write'])
    system = poisoned(job['nan_at']) if 'nan_at' in job else cdrl.SYSTEM
    run = open_run('cdrl', preset, cfg, cdrl.PRESETS[preset], out=job['out'], device='cpu')

    def on_step(
        step, nets
    ):  # tells the test who is at work, once signals are taken care of
        if step == 1:
            (run.folder / f"pid{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
        time.sleep(job.get('sleep', 0.0))

    train(system, cfg, run, progress=False, on_step=on_step)


# --- helpers


def start(out, over=SMALL, launcher=(), **job):
    "Begin a training in a process of its own."
    line = [
        sys.executable,
        *launcher,
        __file__,
        json.dumps(dict(out=str(out), over=over, **job)),
    ]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process, timeout=240):
    "Wait for a process; its exit code and what it said."
    try:
        said, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, said


def complete(out, *args, **job):
    "Train to the end, which must succeed; what the process said."
    code, said = finish(start(out, *args, **job))
    assert code == 0, said
    return said


def steps_of(out):
    "Checkpoints in a folder, as step numbers."
    return [int(p.stem.split('-')[1]) for p in sorted(Path(out).glob('checkpoint-*.pt'))]


def log(out, *keys):
    "The log of a run without wall-clock times."
    lines = [json.loads(o) for o in (Path(out) / 'log.jsonl').read_text().splitlines()]
    return [
        {k: v for k, v in o.items() if (k in keys if keys else k != 'seconds')}
        for o in lines
    ]


def weights(out):
    return load_file(Path(out) / 'weights/model.safetensors')


def assert_same(out, whole):
    "Two finished runs agree to the last bit, in weights and in the whole log."
    a, b = weights(out), weights(whole)
    assert a.keys() == b.keys() and len(a) > 10
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert log(out) == log(whole)
    assert [o['total'] for o in log(out)] == list(range(1, 61))


def wait(process, ready, timeout=120):
    "Return when ready() is true of a running training."
    end = time.monotonic() + timeout
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"not there after {timeout} s"
        time.sleep(0.01)


def logged(out, step):
    return lambda: (
        (out / 'log.jsonl').exists() and (out / 'log.jsonl').read_text().count('\n') >= step
    )


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An uninterrupted run of 60 steps."
    out = tmp_path_factory.mktemp('whole')
    complete(out)
    return out


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
    "The same run, killed at a random moment after its first checkpoint."
    out, rng = tmp_path_factory.mktemp('killed'), random.Random(7)
    process = start(out, sleep=0.1)
    wait(process, logged(out, rng.randint(22, 48)))
    time.sleep(rng.uniform(0, 0.1))
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert (
        not (out / 'weights').exists()
        and len(steps_of(out)) == 2
        and steps_of(out)[-1] < 60
    )
    return out


def copied(out, to):
    shutil.copytree(out, to, dirs_exist_ok=True)
    return to


# --- accidents


def test_a_killed_run_resumes_to_the_last_bit(killed, whole, tmp_path):
    out = copied(killed, tmp_path)
    assert log(out) == log(whole)[: len(log(out))]
    assert 'cannot be read' not in complete(out)
    assert_same(out, whole)


def test_a_truncated_checkpoint_is_recognised_and_the_one_before_is_used(
    killed, whole, tmp_path
):
    out = copied(killed, tmp_path)
    newest = sorted(out.glob('checkpoint-*.pt'))[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size * 2 // 3])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert load_checkpoint(out)['step'] == steps_of(out)[0]
    assert newest.name in str(
        caught[0].message
    ) and 'using the checkpoint before it' in str(caught[0].message)
    assert newest.name in complete(out)
    assert_same(out, whole)


def test_a_run_killed_while_it_writes_a_checkpoint(whole, tmp_path):
    assert finish(start(tmp_path, die_at_write=4))[0] == -signal.SIGKILL
    assert steps_of(tmp_path) == [20, 30]
    complete(tmp_path)
    assert_same(tmp_path, whole)
    assert not list(tmp_path.glob('*.tmp*'))  # what the dead process left behind is gone


def test_a_torn_last_log_line(killed, whole, tmp_path):
    out = copied(killed, tmp_path)
    with open(out / 'log.jsonl', 'a') as f:
        f.write('{"total": 49, "loss/ene')
    complete(out)
    assert_same(out, whole)


def test_sigterm_saves_and_the_next_start_continues(whole, tmp_path):
    process = start(tmp_path, sleep=0.1)
    wait(process, logged(tmp_path, 13))
    process.terminate()
    code, said = finish(process)
    assert code not in (0, -signal.SIGTERM) and 'run the same command again' in said
    at = steps_of(tmp_path)[-1]
    assert (
        at >= 13 and at % 10 and at == len(log(tmp_path))
    )  # saved where it stood, not at the last regular checkpoint
    complete(tmp_path)
    assert_same(tmp_path, whole)


@pytest.mark.skipif(
    not Path('/dev/full').exists(),
    reason="needs /dev/full, a file on a disk that is always full",
)
def test_a_full_disk_leaves_the_earlier_checkpoint(whole, tmp_path):
    preset, cfg = choose(cdrl.PRESETS, cdrl.DEFAULT_PRESET, 'checkerboard', over=SMALL)
    run = open_run('cdrl', preset, cfg, cdrl.PRESETS[preset], out=tmp_path, device='cpu')

    def fill(
        step, nets
    ):  # from now on the temporary file of the next checkpoint lies on the full disk
        if step == 25:
            (tmp_path / f'checkpoint-000000030.tmp{os.getpid()}').symlink_to('/dev/full')

    with pytest.raises(OSError, match='free some space and run again') as caught:
        train(cdrl.SYSTEM, cfg, run, progress=False, on_step=fill)
    assert 'No space left' in str(caught.value) or 'unexpected pos' in str(caught.value)
    assert steps_of(tmp_path) == [10, 20] and load_checkpoint(tmp_path)['step'] == 20
    complete(tmp_path)
    assert_same(tmp_path, whole)


def test_an_interrupted_save_of_any_kind_keeps_the_earlier_ones(tmp_path, monkeypatch):
    runs.save_checkpoint(tmp_path, 1, dict(x=torch.ones(3)))

    def refuse(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(runs.os, 'fsync', refuse)
    with pytest.raises(OSError, match='No space left.*earlier checkpoints are intact'):
        runs.save_checkpoint(tmp_path, 2, dict(x=torch.zeros(3)))
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoint-000000001.pt']
    assert torch.equal(load_checkpoint(tmp_path)['x'], torch.ones(3))


def test_nan_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    code, said = finish(start(tmp_path, nan_at=24))
    assert code != 0 and 'Diverged' in said and 'not finite' in said and 'intact' in said
    assert steps_of(tmp_path) == [10, 20] and not (tmp_path / 'weights').exists()
    saved = load_checkpoint(tmp_path)
    assert saved['step'] == 20
    for state in (saved['nets'], saved['ema']):
        assert all(torch.isfinite(v).all() for v in state.values())
    assert all(abs(v) < float('inf') for o in log(tmp_path, *CURVES) for v in o.values())


# --- one training, divided


def assert_close(out, one, tol=1e-4):
    "Every curve of two logs agrees within `tol` of its largest value, and all weights nearly so."
    a, b = log(out, *CURVES), log(one, *CURVES)
    assert len(a) == len(b) >= 10
    for k in CURVES:
        x, y = (torch.tensor([o[k] for o in c]) for c in (a, b))
        assert ((x - y).abs() <= tol * y.abs().max()).all(), (k, x, y)
    a, b = weights(out), weights(one)
    assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4) for k in b)


TWO = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']


@pytest.mark.parametrize('dataset,over', [('checkerboard', SMALL), ('digits', DIGITS)])
def test_two_processes_equal_one(dataset, over, tmp_path):
    over = over | dict(n_iters=20)
    both = [
        start(tmp_path / 'two', over, TWO, dataset=dataset),
        start(tmp_path / 'one', over, dataset=dataset),
    ]
    for process in both:
        code, said = finish(process)
        assert code == 0, said
    assert (tmp_path / 'two/pid1').exists()
    assert_close(tmp_path / 'two', tmp_path / 'one')


@pytest.mark.parametrize('dataset,over', [('checkerboard', SMALL), ('digits', DIGITS)])
def test_parts_equal_the_whole(dataset, over, tmp_path):
    for micro in (1, 2):
        work(
            dict(
                out=tmp_path / str(micro),
                dataset=dataset,
                over=over | dict(n_iters=20, micro=micro),
            )
        )
    assert_close(tmp_path / '2', tmp_path / '1')


def test_a_signal_to_one_of_two_processes_stops_both(tmp_path):
    process = start(
        tmp_path, SMALL | dict(log_every=1_000, save_every=1_000), TWO, sleep=0.1
    )
    asked = tmp_path / 'pid1'
    wait(process, lambda: asked.exists() and asked.read_text())
    os.kill(int(asked.read_text()), signal.SIGTERM)
    assert finish(process, 60)[0] != 0
    assert (
        len(steps_of(tmp_path)) == 1 and 1 <= steps_of(tmp_path)[0] < 60
    )  # both stopped at the same step and saved
    assert len(log(tmp_path)) == 1 and all(
        abs(v) < float('inf') for o in log(tmp_path, *CURVES) for v in o.values()
    )


def test_bf16(tmp_path):
    work(
        dict(
            out=tmp_path, dataset='digits', over=DIGITS | dict(n_iters=4, precision='bf16')
        )
    )
    assert all(
        torch.isfinite(v).all() and v.dtype == torch.float32
        for v in weights(tmp_path).values()
    )
    assert len(log(tmp_path)) == 4 and all(
        abs(v) < float('inf') for o in log(tmp_path, *CURVES) for v in o.values()
    )


if __name__ == '__main__':
    work(json.loads(sys.argv[1]))
