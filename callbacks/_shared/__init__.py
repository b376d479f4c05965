"""What all callbacks share: wrapping, starting forwards only once, meters, checkpoints, words."""
