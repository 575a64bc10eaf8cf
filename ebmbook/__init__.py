"Energy-based generative models: a book that runs."

from importlib import import_module
from importlib.util import find_spec

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
