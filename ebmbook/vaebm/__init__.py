"VAEBM (chapter 6)."

from ebmbook import offer

_PARTS = ('presets', 'vae', 'cells', 'nvae', 'elbo', 'own', 'nets', 'method', 'rivals', 'tasks')
__getattr__, __dir__ = offer(__name__, _PARTS)
