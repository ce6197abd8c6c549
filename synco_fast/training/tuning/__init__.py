"""What a step costs: trials that choose engine and pipeline, the profiler, the launch audit."""
