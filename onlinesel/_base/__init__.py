"""What every room may use: copies between host and device, and words of errors."""
