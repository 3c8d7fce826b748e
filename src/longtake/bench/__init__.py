"""What generation costs: clocks and meters (``bench.meter``), streams that take turns (``bench.turns``), and
the benchmarks of a model on a CPU, of its memory and of latent attention.
"""
