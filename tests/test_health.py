"The health of chains in every log: there from the first step, cheap, and without any effect."

import json
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tiny import bare, clock, digest, few_cars, settings, trained, went_on

from ebmbook.learn import step as learn_step
from ebmbook.learn.health import Health
from ebmbook.learn.loop import train
from ebmbook.learn.runs import open_run
from ebmbook.shell.systems import SYSTEMS, load_system


class Nobody:
    "In the place of `Health`: looks at nothing."

    def __init__(self, ctx, closely=False):
        self.ctx, self.rows = ctx, {}

    def watch(self):
        return nullcontext()

    def take(self):
        return {}


@pytest.fixture(scope='module', autouse=True)
def cars():
    with few_cars():
        yield


WITH_CHAINS = [name for name in SYSTEMS if name != 'selfsup']


@pytest.mark.parametrize('name', WITH_CHAINS)
def test_logged_from_the_first_step_without_effect(name, tmp_path, monkeypatch):
    whole = load_system(name)
    # no step ends a whole line: what the line of the last step tells is of the first
    cfg = settings(whole, log_every=50)
    system = bare(whole, cfg)
    nets, lines = trained(system, cfg, tmp_path / 'with')
    line = lines[-1]
    assert 'chain/moved' in line and line['step'] == cfg.n_iters > 1
    assert 'gap' in line and any(key.startswith('grad/') for key in line)
    assert all(value == value for line in lines for value in line.values())  # no NaN
    monkeypatch.setattr(learn_step, 'Health', Nobody)
    blind, less = trained(system, cfg, tmp_path / 'without')
    assert digest(blind) == digest(nets)
    for line, more in zip(less, lines, strict=True):
        assert line == {key: more[key] for key in line}
        extra = more.keys() - line.keys()
        assert all(key.startswith(('chain/', 'chain.')) for key in extra)


AGED = dict(p_max=0.6, buffer=20, p_rise=1, n_iters=6, log_every=1, save_every=2)


def test_ages_of_a_buffer_resume(tmp_path):
    "VAEBM's persistent chains: the ages of an interrupted training are the same."
    whole = load_system('vaebm')
    cfg = settings(whole, **AGED)
    system = bare(whole, cfg)
    _, lines = trained(system, cfg, tmp_path / 'whole')
    ages = [line['buffer/age'] for line in lines if 'buffer/age' in line]
    assert len(ages) == 6 and ages[0] == 0 and max(ages) > 0.5

    def stop(step, nets):
        time.sleep(0.03)
        if step == 3:  # the autoencoder's stage has one step
            raise KeyboardInterrupt

    run = open_run(system.name, 'tiny', cfg, out=tmp_path / 'parts', device='cpu')
    with pytest.raises(KeyboardInterrupt):
        train(system, cfg, run, progress=False, on_step=stop)
    kept = clock(run.folder)
    train(system, cfg, run, progress=False)
    log = (run.folder / 'log.jsonl').read_text().splitlines()
    assert len(kept) > 1 and went_on(run.folder, kept)
    again = [json.loads(line) for line in log]
    assert [line['buffer/age'] for line in again if 'buffer/age' in line] == ages


# The presets of the claims, whose networks are the smallest: there a look costs most.
TIMED = dict(
    cdrl='digits-claim', coopflow='digits-claim', vaebm='digits-claim', ecvae='digits-claim',
    liebm='digits-claim', nerf_lebm='cars-claim', foundations='digits',
)  # fmt: skip


@pytest.mark.timing
@pytest.mark.parametrize('name', TIMED)
def test_costs_less_than_two_hundredths(name, tmp_path, monkeypatch):
    "Processor time of the looks, in that of 100 steps of the stage with the chains."
    torch.set_num_threads(1)
    whole = load_system(name)
    cfg = whole.presets[TIMED[name]]
    *early, last = (stage for stage in whole.of(cfg).stages if stage.n_iters(cfg))
    stages = [stage._replace(finish=None, n_iters=lambda c: 0) for stage in early]
    stages.append(last._replace(finish=None, n_iters=lambda c: 100))
    system = replace(whole.of(cfg), stages=stages, rivals={})
    looks = []

    def timed(self, *args):
        start = time.process_time()
        look(self, *args)
        looks.append(time.process_time() - start)

    look = Health._chain
    monkeypatch.setattr(Health, '_chain', timed)
    run = open_run(name, 'x', cfg, out=tmp_path / 'run', device='cpu')
    start = time.process_time()
    train(system, cfg, run, progress=False)
    share = sum(looks) / (time.process_time() - start)
    print(f'{name}: {len(looks)} looks, {share:.2%}')
    assert looks and share < 0.02
