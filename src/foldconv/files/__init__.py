"""Weights on a disk: our own files, published checkpoints, other frameworks'."""
