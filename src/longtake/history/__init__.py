"""What a new chunk may attend to: policies, positions, and the two ways to commit."""
