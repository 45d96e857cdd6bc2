"""The LLaMA family: LLaMA 1, 2 and 3, and Code Llama."""
