"Maximum likelihood for energies (chapter 2)."

from ebmbook import offer

__getattr__, __dir__ = offer(__name__, ('presets', 'frame', 'latent', 'method', 'tasks'))
