"""Several processes: what they tell each other, and what they must have alike."""
