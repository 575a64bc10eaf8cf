"A part of `make reliability`: every system is killed once, and trainings are stopped and damaged."

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebmbook.shell.systems import SYSTEMS

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
def test_a_part_of_it():
    line = [
        sys.executable,
        str(HERE / 'reliability.py'),
        '--kills',
        str(len(SYSTEMS)),
        '--signals',
        '3',
    ]
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run(line, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert 'all as it should' in done.stdout
