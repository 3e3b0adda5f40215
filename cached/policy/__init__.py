"""What stays where: pure functions of a snapshot and the time."""
