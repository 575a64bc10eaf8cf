"""One batch, divided: two processes, and two parts of one process, train what one would train.

Networks learn by plain gradient descent, whose steps are as close as its gradients; Adam makes
a whole step of a gradient that is rounding alone.
"""

import json
import os
import socket
import traceback
from contextlib import closing
from dataclasses import replace

import pytest
import tiny
import torch
import torch.utils.data  # before any fork

from ebmbook.learn.contract import Group
from ebmbook.learn.draws import seed_all
from ebmbook.learn.runs import load_checkpoint
from ebmbook.shell.systems import load_system

RATE = 1e-3  # of the descent
# system, base of tests/tiny.py, changes; with dropout, batch norm, buffers and tables of codes
CASES = [
    ('foundations', '', {}),
    ('nerf_lebm', '', {}),
    ('nerf_lebm', '', dict(inference='persistent')),
    ('coopflow', '', {}),
    ('coopflow', 'images', dict(wet=True, drop=0.3)),
    ('cdrl', '', {}),
    ('cdrl', 'images', dict(dropout=0.3)),
    ('vaebm', '', {}),
    ('vaebm', '', dict(method='ebm', buffer=16, n_iters=4)),
    ('vaebm', 'images', {}),
    ('ecvae', '', {}),
    ('ecvae', 'images', dict(posterior=True)),
    ('ecvae', 'images', dict(norm='batch')),
    ('liebm', '', {}),
    ('liebm', '', dict(method='erm')),
    ('selfsup', '', {}),
    ('selfsup', '', dict(method='byol')),
    ('selfsup', '', dict(method='wmse')),
    ('liebm', '', dict(encoder='joint')),
    ('vaebm', '', dict(p_max=1.0, p_rise=1, buffer=16, n_iters=5)),
    ('vaebm', '', dict(queue=True, p_max=1.0, p_rise=1, buffer=16, n_iters=5)),
]
# mean and variance of a part are not those of the batch
NORMED = [
    ('vaebm', 'images', {}),
    ('ecvae', 'images', dict(norm='batch')),
    ('liebm', '', {}),
    ('liebm', '', dict(method='erm')),
]


def descent(stage):
    "A stage whose groups take plain steps."

    def optimisers(nets):
        found = {}
        for name, group in stage.optimisers(nets).items():
            params = [o for part in group.optimiser.param_groups for o in part['params']]
            found[name] = Group(torch.optim.SGD(params, RATE))
        return found

    return stage._replace(optimisers=optimisers)


def plain(system, cfg):
    found = tiny.bare(system, cfg)
    return replace(found, stages=[descent(stage) for stage in found.stages])


def work(name, base, out, changes):
    "A short training; what it leaves of itself in a file."
    system = load_system(name)
    cfg = tiny.settings(system, base, **changes)
    nets, lines = tiny.trained(plain(system, cfg), cfg, out)
    torch.save(nets.state_dict(), out / f"nets-{os.environ.get('RANK', 0)}.pt")
    return nets, lines


def free_port():
    with closing(socket.socket()) as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]


def _member(rank, port, folder, job):
    "One of two processes."
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    os.environ |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    code = 1
    try:
        job()
        code = 0
    except BaseException:
        (folder / f'said-{rank}').write_text(traceback.format_exc())
    finally:
        os._exit(code)


def both(folder, job):
    "Do a job in two forks that train together."
    folder.mkdir()
    pids, port = [], free_port()
    for rank in range(2):
        pids.append(os.fork())
        if not pids[-1]:
            _member(rank, port, folder, job)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    said = ''.join(path.read_text() for path in folder.glob('said-*'))
    assert codes == [0, 0], said


def begun(system, cfg):
    "Networks before the first step."
    seed_all(0)
    return {k: v.clone() for k, v in tiny.bare(system, cfg).build(cfg).state_dict().items()}


def far(one, two, start):
    """Names of tensors that differ by more than a thousandth of their way.

    Sums are taken in another order; a change by rounding alone is no way.
    """
    found = []
    assert one.keys() == two.keys()
    for name, value in one.items():
        ends = [o[name].double() for o in (one, two, start)]
        gap, way = (ends[0] - ends[1]).norm(), (ends[0] - ends[2]).norm()
        if gap > 1e-3 * way + 2e-7 * value.numel() ** 0.5:
            found.append((name, gap.item(), way.item()))
    return found


def read(out):
    "Lines of a log without the clock, and without spreads, which are means over parts."
    lines = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    left_out = {'seconds', 'spread', 'spread_seen'}
    return [{k: v for k, v in line.items() if k not in left_out} for line in lines]


def same_log(one, two):
    lines = list(zip(read(one), read(two), strict=True))
    assert lines
    for left, right in lines:
        assert right.pop('stage') == left.pop('stage')
        assert right == pytest.approx(left, rel=1e-3, abs=1e-5)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "What one process makes of a case, in one part; each case once."
    known = {}

    def find(name, base, changes):
        key = name, base, str(changes)
        if key not in known:
            out = tmp_path_factory.mktemp('alone')
            system = load_system(name)
            start = begun(system, tiny.settings(system, base, **changes))
            known[key] = work(name, base, out, changes)[0].state_dict(), start, out
            moved = [k for k, v in known[key][0].items() if not torch.equal(v, start[k])]
            assert moved
        return known[key]

    with tiny.few_cars():
        yield find


def cases(**marks):
    found = []
    for case in CASES:
        label = '-'.join([case[0], *filter(None, case[1:2]), *map(str, case[2].values())])
        found.append(pytest.param(*case, id=label, marks=marks.get(case[0], ())))
    return found


@pytest.mark.parametrize('name,base,changes', cases())
def test_two_processes_equal_one(name, base, changes, alone, tmp_path):
    nets, start, out = alone(name, base, changes)
    two = tmp_path / 'two'
    both(two, lambda: work(name, base, two, changes))
    first, second = (torch.load(two / f'nets-{rank}.pt') for rank in (0, 1))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert far(nets, first, start) == []
    same_log(out, two)


@pytest.mark.parametrize('name,base,changes', cases())
def test_parts_equal_the_whole(name, base, changes, alone, tmp_path):
    if name == 'selfsup' or changes.get('encoder') == 'joint':
        with pytest.raises(ValueError, match='micro must be 1: the images of a batch are'):
            work(name, base, tmp_path, changes | dict(micro=2))
        return
    nets, start, out = alone(name, base, changes)
    parts = work(name, base, tmp_path, changes | dict(micro=2))[0].state_dict()
    counts = [key for key in nets if key.endswith('num_batches_tracked')]
    assert [key for key in counts if nets[key] != parts[key]] == []
    found = far(nets, parts, start)
    if (name, base, changes) in NORMED:  # the exception, and only where there are norms
        assert counts and found
    else:
        assert found == []
        same_log(out, tmp_path)


@pytest.mark.parametrize(
    'name,base,changes', [*CASES[4:5], *CASES[8:10], *CASES[-2:]], ids=str
)
def test_parts_of_two_processes(name, base, changes, alone, tmp_path):
    two, changes = tmp_path / 'two', changes | dict(micro=2)
    both(two, lambda: work(name, base, two, changes))
    first, second = (torch.load(two / f'nets-{rank}.pt') for rank in (0, 1))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    if (name, base) != CASES[9][:2]:
        nets, start, out = alone(
            name, base, {k: v for k, v in changes.items() if k != 'micro'}
        )
        assert far(nets, first, start) == []
        same_log(out, two)


@pytest.mark.parametrize('case', CASES[-2:], ids=str)
def test_chains_go_on_from_one_buffer(case, alone, tmp_path):
    out, two = alone(*case)[2], tmp_path / 'two'
    both(two, lambda: work(*case[:2], two, case[2]))
    one, other = (load_checkpoint(folder)['state'] for folder in (out, two))
    assert one.keys() == other.keys()
    assert one['buffer'].abs().sum(1).count_nonzero() > 8  # of more than one step
    assert torch.allclose(one['buffer'], other['buffer'], atol=1e-5)


def test_replay_buffers_are_those_of_one_process(alone, tmp_path):
    case = 'vaebm', '', dict(method='ebm', buffer=16, n_iters=4)
    out, two = alone(*case)[2], tmp_path / 'two'
    both(two, lambda: work(case[0], case[1], two, case[2]))
    one, other = (load_checkpoint(folder)['state'] for folder in (out, two))
    assert one.keys() == other.keys() and 'x/age' in one
    assert torch.equal(one['x/age'], other['x/age'])
    assert torch.allclose(one['x'], other['x'], atol=1e-4)
