"Files that make a folder if they are trusted."

import os
import pickle

import torch

KINDS = ['pickle', 'old', 'zip', 'inside']


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def craft(path, ran, kind):
    "A file of one kind that makes the folder `ran`."
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == 'pickle':
        path.write_bytes(pickle.dumps(Command(ran)))
        return
    held = {'weight': Command(ran)} if kind == 'inside' else Command(ran)
    torch.save(held, path, _use_new_zipfile_serialization=kind != 'old')


def trust(path, kind):
    "Read such a file as it must not be read."
    if kind == 'pickle':
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
