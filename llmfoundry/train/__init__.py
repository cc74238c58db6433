"""The trainer: durations, schedules, optimizers, checkpoints, the step and the loop."""
