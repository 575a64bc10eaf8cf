"""Run a chapter as a user runs it."""
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

def limit(seconds): # a busy machine is given more
    return seconds if os.getloadavg()[0]<=os.cpu_count()+.5 else 10*seconds

def papermill(chapter, tmp_path, data, *args, timeout=900):
    "Run a notebook of `nbs` elsewhere; exit code, all that was said, seconds."
    nowhere = 'http://127.0.0.1:9'   # the network is off, so that no test depends on what a server sends
    env,began = os.environ | dict(EBMBOOK_DATA=str(data), TORCH_HOME=str(tmp_path), http_proxy=nowhere, https_proxy=nowhere),time.monotonic()
    env.pop('MPLBACKEND', None)      # figures go into the notebook
    line = [sys.executable, '-m', 'papermill', str(ROOT/'nbs'/f'{chapter}.ipynb'), str(tmp_path/'out.ipynb'), '-k', 'python3', '--no-progress-bar', *args]
    done = subprocess.run(line, env=env, cwd=tmp_path, timeout=timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode,done.stdout,time.monotonic()-began
