"""Scoring an exported model on GPUs; imports no jax."""
