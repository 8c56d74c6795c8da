"""The training engine: any global batch, exact resume, one loop for every workload."""
