"LIEBM (chapter 8)."

from ebmbook import offer

__getattr__, __dir__ = offer(__name__, ('nets', 'method'))
