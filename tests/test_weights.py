"Shipped weights are small, load, and still measure what the ledger says."

import importlib

import pytest

from ebmbook.learn.ledger import ledger
from ebmbook.learn.runs import weights_folder

FOLDERS = sorted(weights_folder().glob('*-*'))


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda p: p.name)
def test_shipped_weights_measure_what_the_ledger_says(folder):
    system, preset = folder.name.split('-', 1)
    module = importlib.import_module(f'ebmbook.{system}')
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 2 * 2**20
    nets = module.Nets.from_pretrained(folder).eval()
    assert nets.cfg == module.PRESETS[preset], (
        "the preset has changed since these weights were made"
    )
    lines = [
        o
        for o in ledger(system=system, preset=preset, seed=0)
        if o['at'].get('weights') == 'book'
    ]
    assert lines, f"no ledger line for {folder.name}"
    for at in {
        repr(sorted(o['at'].items())): o['at'] for o in lines
    }.values():  # a preset may have been measured in several ways
        options = {key: value for key, value in at.items() if key != 'weights'}
        got = module.SYSTEM.evaluate(nets, **options)
        for line in (o for o in lines if o['at'] == at):
            value, n, extractor = got[line['metric']]
            assert (n, extractor) == (line['n'], line['extractor'])
            # Another machine rounds differently, and a chain amplifies it: a tenth of the
            # value, and for shares of n samples four standard errors.
            share = 0 <= line['value'] <= 1
            slack = 4 * (0.25 / n) ** 0.5 if share else 1e-3
            assert value == pytest.approx(line['value'], rel=0.1, abs=slack), (
                at,
                line['metric'],
            )


def test_there_are_weights_to_test():
    assert {'cdrl-checkerboard', 'cdrl-digits-cond', 'cdrl-shapes-composition'} <= {
        p.name for p in FOLDERS
    }
