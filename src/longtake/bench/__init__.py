"""What generation costs: clocks and meters (``bench.meter``) and the CPU benchmark (``bench.cpu``)."""
