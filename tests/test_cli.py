"The command line from outside: as a process, on a bare machine, interrupted, failing."

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from ebmbook import cdrl
from ebmbook.learn.contract import Diverged
from ebmbook.learn.ledger import ledger
from ebmbook.learn.runs import root
from ebmbook.learn.system import Measured, Task
from ebmbook.shell import cli, judging

TINY = '{n_iters: 2, batch: 8, ch: 8, init_ch: 8, n_steps: 1}'
CLAIMS = """
- id: cooperation
  system: cdrl
  source: zhu2024dissertation
  statement: Cooperation brings more samples into the squares.
  metric: inside
  arms:
    full:  {preset: checkerboard, over: {n_iters: 3, batch: 8, ch: 8, init_ch: 8, n_steps: 1}}
    alone:
      preset: checkerboard
      over: {n_iters: 3, batch: 8, ch: 8, init_ch: 8, n_steps: 1, coop: false}
    two:
      preset: checkerboard
      over: {n_iters: 3, batch: 8, ch: 8, init_ch: 8, n_steps: 1}
      at: {n_steps: 2}
  compare:
    - {larger: full, smaller: alone}
    - {larger: two, smaller: -1}
"""


def invoke(*args):
    return CliRunner().invoke(cli.app, [str(a) for a in args])


def process(*args, **env):
    return subprocess.run(
        [sys.executable, '-m', 'ebmbook.shell.cli', *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | env,
        timeout=300,
    )


def test_help_is_quick():
    "Help comes without PyTorch; processor time counts, because the machine may be busy."
    code = (
        "import sys\nsys.argv = ['ebmbook', '--help']\n"
        "from ebmbook.shell.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'papermill', 'fastcore', 'matplotlib'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    spent = lambda: sum(os.times()[2:4])
    start = spent()
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert res.returncode == 0 and 'datasets' in res.stdout, res.stderr
    assert spent() - start < 1


def test_bare_machine(tmp_path):
    "Training and sampling need none of the packages that a bare machine lacks."
    lacking = [
        'fastcore',
        'papermill',
        'nbformat',
        'torch_fidelity',
        'nbdev',
        'rich',
        'tensorboard',
    ]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({lacking!r}))  # as if they were not there
from ebmbook.shell.cli import app
run, x, cpu = {str(tmp_path / 'run')!r}, {str(tmp_path / 'x.npy')!r}, ['--device', 'cpu']
train = ['train', 'cdrl', '-p', 'preset', 'checkerboard', '-p', 'over', {TINY!r}, '--out', run]
sample = ['sample', 'cdrl', '--weights', run, '-n', '2', '--out', x]
for args in (train + cpu, sample + cpu, ['run', 'cdrl']):
    try: app(args)
    except SystemExit as e: print('exit', e.code)
"""
    res = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path
    )
    assert [o for o in res.stdout.splitlines() if o.startswith('exit')] == [
        'exit 0',
        'exit 0',
        'exit 2',
    ], res.stdout + res.stderr
    assert (tmp_path / 'x.npy').is_file() and 'needs papermill' in res.stderr


CPU = ('--device', 'cpu')
CHECKERBOARD = ('-p', 'preset', 'checkerboard', '-p', 'over', TINY)


def test_weights_kept_over_a_training(tmp_path):
    "Each folder that stays is one of weights for the other commands."
    res = invoke('train', 'cdrl', *CHECKERBOARD, '--out', tmp_path, *CPU, '--keep-every', 1)
    assert res.exit_code == 0, res.output
    names = ['weights', 'weights-000000001', 'weights-000000002']
    assert sorted(path.name for path in tmp_path.glob('weights*')) == names
    drawn = []
    for name in names:
        out = tmp_path / f'{name}.npy'
        draw = ('sample', 'cdrl', '--weights', tmp_path / name, '-n', 2, '--out', out)
        assert invoke(*draw, *CPU).exit_code == 0
        drawn.append(out.read_bytes())
    end, first, last = drawn
    assert first != last and last == end


def test_missing_data_as_a_process(tmp_path):
    res = process(
        'train',
        'cdrl',
        '-p',
        'dataset',
        'imagenet32',
        '--out',
        tmp_path / 'run',
        EBMBOOK_DATA=str(tmp_path),
    )
    assert (
        res.returncode == 2
        and 'Traceback' not in res.stderr
        and not (tmp_path / 'run').exists()
    )
    for o in 'missing:', str(tmp_path.resolve()), 'image-net.org':
        assert o in res.stderr
    res = process(
        'train',
        'cdrl',
        '-p',
        'dataset',
        'imagenet32',
        '--debug',
        EBMBOOK_DATA=str(tmp_path),
    )
    assert res.returncode == 1 and 'Traceback' in res.stderr


def test_two_processes(tmp_path):
    "torchrun -m ebmbook.shell.cli trains, and says so once."
    cmd = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--nproc_per_node',
        '2',
        '-m',
        'ebmbook.shell.cli',
        'train',
        'cdrl',
        '-p',
        'preset',
        'checkerboard',
        '-p',
        'over',
        TINY,
        '--out',
        str(tmp_path / 'run'),
        '--device',
        'cpu',
    ]
    res = subprocess.run(
        cmd,
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
        timeout=300,
    )
    assert res.returncode == 0, res.stderr
    assert (
        res.stdout.count('next: ebmbook sample') == 1
        and (tmp_path / 'run/weights/model.safetensors').is_file()
    )


@pytest.mark.parametrize(
    'error,code,told',
    [
        (Diverged('the gap is 1e9'), 1, 'the gap is 1e9'),
        (OSError(28, 'No space left on device'), 2, 'No space left'),
        (MemoryError(), 2, 'larger micro'),
        (
            KeyboardInterrupt(
                'stopped by a signal at step 1; run the same command again to continue'
            ),
            130,
            'run the same command again',
        ),
    ],
)
def test_failing_training(tmp_path, monkeypatch, error, code, told):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr('ebmbook.learn.loop.train', fail)
    args = [
        'train',
        'cdrl',
        '-p',
        'preset',
        'checkerboard',
        '-p',
        'over',
        TINY,
        '--out',
        tmp_path,
        '--device',
        'cpu',
    ]
    res = invoke(*args)
    assert res.exit_code == code and told in res.output and 'Traceback' not in res.output
    if isinstance(error, Exception):
        assert invoke(*args, '--debug').exception is error


def notebook(cells):
    "A chapter with a parameters cell."
    code = lambda src, tags: dict(
        cell_type='code',
        id=f'c{len(src)}',
        source=src,
        metadata={'tags': tags},
        outputs=[],
        execution_count=None,
    )
    return json.dumps(
        dict(
            nbformat=4,
            nbformat_minor=5,
            metadata={
                'kernelspec': dict(
                    name='python3', display_name='python3', language='python'
                )
            },
            cells=[
                code('seed = 0\nover = {}', ['parameters']),
                *(code(o, []) for o in cells),
            ],
        )
    )


def test_run(tmp_path, monkeypatch):
    "Parameters reach the notebook; an error in it ends with its last line and a non-zero status."
    pytest.importorskip('papermill')
    path = tmp_path / '05_toy.ipynb'
    path.write_text(
        notebook(["print(seed, over)\nif seed==3: raise ValueError('three is too many')"])
    )
    monkeypatch.setattr(cli, 'find_notebook', lambda system: path)
    res = invoke(
        'run',
        'toy',
        '-p',
        'seed',
        2,
        '-p',
        'over',
        '{a: 1}',
        '--out',
        tmp_path / 'deep' / 'two.ipynb',
    )
    assert (
        res.exit_code == 0 and "2 {'a': 1}" in (tmp_path / 'deep' / 'two.ipynb').read_text()
    ), res.output
    res = invoke('run', 'toy', '-p', 'seed', 3, '--out', tmp_path / 'three.ipynb')
    assert (
        res.exit_code == 1
        and 'ValueError: three is too many' in res.output
        and 'Traceback (' not in res.output
    )
    res = invoke('run', 'toy', '-p', 'sede', 3, '--out', tmp_path / 'four.ipynb')
    assert (
        res.exit_code == 2
        and "did you mean 'seed'" in res.output
        and not (tmp_path / 'four.ipynb').exists()
    )


@pytest.fixture
def claims(tmp_path, monkeypatch):
    "A tiny claims file, a cheap evaluation, and a function that runs `ebmbook claims` on them."
    (tmp_path / 'claims.yaml').write_text(CLAIMS)

    def measure(nets, generator, *, n_steps=None):
        x = cdrl.sample(nets, 32, n_steps=n_steps, generator=generator)
        return dict(inside=Measured(cdrl.in_square(x).float().mean().item(), 32))

    cheap = replace(cdrl.SYSTEM, tasks=(Task('sample', measure),))
    monkeypatch.setattr(cdrl.tasks, 'SYSTEM', cheap)

    def run(*args):
        return invoke(
            'claims',
            '--file',
            tmp_path / 'claims.yaml',
            '--ledger',
            tmp_path / 'ledger.jsonl',
            '--out',
            tmp_path / 'runs',
            '--device',
            'cpu',
            *args,
        )

    run.lines = lambda: ledger(tmp_path / 'ledger.jsonl')
    return run


def test_claims_run(claims):
    before = [p.read_bytes() for p in (root() / 'results').glob('ledger.jsonl')]
    res = claims('--json')
    # a name that was typed wrong is no empty ledger; a run makes one
    assert res.exit_code == 2 and 'ledger.jsonl' in res.stderr and not claims.lines()
    res = claims('--run', '--seeds', 0, 1, 2, '--json')
    assert res.exit_code == 0, res.output
    got = json.loads(res.stdout)[0]
    assert (
        got['seeds'] == [0, 1, 2]
        and got['verdict'] != 'not run'
        and {'id', 'system', 'paper', 'ours', 'verdict', 'seeds'} <= got.keys()
    )
    assert (
        len(claims.lines()) == 9 and 'trainings 6, measurements 9' in res.stderr
    )  # `two` shares the trainings of `full`
    assert all(o['seconds'] >= 0 and len(o['source']) == 12 for o in claims.lines())
    assert 'trainings 0' in claims('--run').stderr
    assert 'trainings 2, measurements 3' in claims('--run', '--seeds', '3').stderr
    assert before == [
        p.read_bytes() for p in (root() / 'results').glob('ledger.jsonl')
    ]  # the committed ledger is out of reach


def test_claims_resume(claims, monkeypatch):
    "What was measured before an interrupt stays; the next run does the rest."
    whole = judging.do_job

    def stop(job, *args):
        if job.seed == 1:
            raise KeyboardInterrupt('stopped')
        return whole(job, *args)

    monkeypatch.setattr(judging, 'do_job', stop)
    assert claims('--run').exit_code == 130 and {o['seed'] for o in claims.lines()} == {0}
    monkeypatch.setattr(judging, 'do_job', whole)
    res = claims('--run')
    assert res.exit_code == 0 and len(claims.lines()) == 9 and 'trainings 5' in res.stderr


def test_claims_failed_arm(claims, monkeypatch):
    "An arm that diverges is reported and the others are measured all the same."
    whole = judging.do_job

    def diverge(job, *args):
        if 'coop' in job.over:
            raise Diverged('the energy gap is 1e9')
        return whole(job, *args)

    monkeypatch.setattr(judging, 'do_job', diverge)
    res = claims('--run')
    assert (
        res.exit_code == 1
        and len(claims.lines()) == 6
        and 'failed: cdrl checkerboard' in res.stderr
        and 'NOT RUN' in res.stdout
    )


def test_claims_check_everything_first(claims, tmp_path):
    (tmp_path / 'claims.yaml').write_text(CLAIMS.replace('coop: false', 'cop: false'))
    res = claims('--run')
    assert (
        res.exit_code == 2
        and "did you mean 'coop'" in res.output
        and not claims.lines()
        and not (tmp_path / 'runs').exists()
    )
    (tmp_path / 'claims.yaml').write_text(CLAIMS.replace('coop: false', 'coop: true'))
    assert 'must be written' in claims('--run').output
    (tmp_path / 'claims.yaml').write_text(
        CLAIMS.replace('metric: inside', 'metric: outside')
    )
    res = claims('--run', '--seeds', '0')
    assert res.exit_code == 1 and 'not every metric' in res.output
