"Numbers for samples, scores and reconstructions."

from ebmbook import offer

__getattr__, __dir__ = offer(
    __name__,
    (
        'pairs',
        'likelihood',
        'restoration',
        'extractors',
        'training',
        'distances',
        'images',
        'classes',
        'outliers',
    ),
)
