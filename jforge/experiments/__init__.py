"""What each mechanism can and cannot remember, measured on tiny models: training, measurements, and their records."""
