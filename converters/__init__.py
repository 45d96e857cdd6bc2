"""Weights between Hugging Face, EasyLM and native checkpoints."""
