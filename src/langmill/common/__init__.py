"""What every room may use: errors, settings, files, progress, metrics. No torch."""
