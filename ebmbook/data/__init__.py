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
        'glyphs',
        'catalogue',
        'outliers',
        'given',
        'held',
    ),
)
