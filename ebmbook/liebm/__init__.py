"LIEBM (chapter 8)."

from ebmbook import offer

__getattr__, __dir__ = offer(
    __name__, ('presets', 'nets', 'joint', 'method', 'uses', 'tasks')
)
