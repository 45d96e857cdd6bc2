"""One file per run; its docstring says how to run it and what to expect."""
