"""MotionReward: one reward model over three representations."""
