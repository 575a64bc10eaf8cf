"Data sets of the book, by name, and folders of images."

from ebmbook import offer

__getattr__, __dir__ = offer(
    __name__,
    (
        'examples',
        'scenes',
        'pictures',
        'cameras',
        'folders',
        'files',
        'procedural',
        'catalogue',
        'outliers',
        'given',
        'held',
    ),
)
