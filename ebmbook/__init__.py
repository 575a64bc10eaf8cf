"Energy-based generative models: a book that runs."

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # they import PyTorch, and help must come at once
    from ebmbook.learn.compose import Energy, tempered
    from ebmbook.learn.fit import Fitted, fit, load_fitted
    from ebmbook.shell.model import Model, load, models
    from ebmbook.shell.training import train

__version__ = "0.1.0"


def offer(package, parts):
    """Attributes of a package that come from its parts, which are imported when one is asked for.

    Earlier parts win, and a part that cannot be imported does not hide those before it.
    Returns `__getattr__` and `__dir__` of the package.
    """

    def find(name):
        if name.startswith('__'):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if find_spec(f'{package}.{name}') is not None:
            return import_module(f'{package}.{name}')
        for part in parts:
            module = import_module(f'{package}.{part}')
            if name in vars(module):
                return vars(module)[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names():
        modules = [import_module(f'{package}.{part}') for part in parts]
        return sorted({*parts, *(name for module in modules for name in module.__all__)})

    return find, names


# the front door: name -> the part that holds it, imported when it is asked for
_FRONT = {
    'Energy': 'learn.compose',
    'Fitted': 'learn.fit',
    'Model': 'shell.model',
    'fit': 'learn.fit',
    'load': 'shell.model',
    'load_fitted': 'learn.fit',
    'models': 'shell.model',
    'tempered': 'learn.compose',
    'train': 'shell.training',
}
__all__ = [
    'Energy',
    'Fitted',
    'Model',
    'fit',
    'load',
    'load_fitted',
    'models',
    'tempered',
    'train',
]


def __getattr__(name):
    if name not in _FRONT:
        raise AttributeError(f"module 'ebmbook' has no attribute {name!r}")
    return getattr(import_module(f'ebmbook.{_FRONT[name]}'), name)


def __dir__():
    return sorted({*globals(), *_FRONT})
