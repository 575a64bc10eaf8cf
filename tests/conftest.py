"""Every test sees the same machine: one thread, the CPU, no data but what it writes itself.

None trains in a folder of the clone.

Read before PyTorch is imported; the subprocesses that tests start inherit all of it.
"""

import os
import tempfile

# Results to the last bit need a fixed number of threads, and two test processes on two cores
# must not ask for more.
for _name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
    os.environ.setdefault(_name, '1')
os.environ.update(
    EBMBOOK_DEVICE='cpu',
    IN_TEST='1',
    MPLBACKEND='agg',
    HF_HUB_OFFLINE='1',
    PYTHONHASHSEED='0',
)


def pytest_configure(config):
    empty = tempfile.TemporaryDirectory(
        prefix='ebmbook-no-data-'
    )  # a reader's own data sets change nothing here
    os.environ['EBMBOOK_DATA'] = empty.name
    config.add_cleanup(empty.cleanup)
