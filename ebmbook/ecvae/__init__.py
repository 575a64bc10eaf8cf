"EC-VAE and EC-Flow (chapter 7)."

from ebmbook import offer

__getattr__, __dir__ = offer(__name__, ('presets', 'nets', 'own', 'parts', 'method', 'rivals', 'tasks'))
