"""What a run takes and what a result saves, told before any work: FLOPs, memory, disk, seconds,
measured latency, budgets of the whole model."""
