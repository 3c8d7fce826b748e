"""How one token is stored: layouts, their specs, and fixed buffers for them."""
