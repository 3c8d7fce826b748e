"""Evaluation against the verifiable world: metrics with intervals, the sharded runner, reports."""
