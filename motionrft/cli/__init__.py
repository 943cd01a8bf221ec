"""The motionrft command."""
