"""Where and how a stage runs: device and precision, share of the work, interrupts, progress."""
