"CDRL (chapter 5)."

from ebmbook import offer

_PARTS = ('presets', 'ladder', 'own', 'nets', 'latents', 'method', 'tasks')
__getattr__, __dir__ = offer(__name__, _PARTS)
