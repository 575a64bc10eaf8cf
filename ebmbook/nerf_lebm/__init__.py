"NeRF-LEBM (chapter 3)."

from ebmbook import offer

__getattr__, __dir__ = offer(
    __name__, ('presets', 'nerf', 'angles', 'views', 'nets', 'method', 'tasks')
)
