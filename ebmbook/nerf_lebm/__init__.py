"NeRF-LEBM (chapter 3)."

from ebmbook import offer

__getattr__, __dir__ = offer(__name__, ('nerf', 'method'))
