"""longtake: endless video from a text prompt, streamed chunk by chunk at constant cost.

A chunk-causal diffusion transformer writes the video a few latent frames at a time; what a new chunk may
look back at lives in a history of fixed size, so that the hundredth hour costs what the first second did.

Importing this package loads nothing heavy: import the module that you need, for instance
``longtake.stream`` to generate or ``longtake.world`` to render verifiable scenes. The command line is
``longtake --help`` (also ``python -m longtake``).
"""

__version__ = "0.1.0"
