"""Op cases, float64 oracles, backends, tolerances and timers: tests and benchmarks are two readers of one list."""
