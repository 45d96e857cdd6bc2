"""What a run takes of machines that are not there: memory, FLOPs, traffic and time."""
