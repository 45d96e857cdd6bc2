"""From files of conversations to batches: sources, rows, encode, pack, batches."""
