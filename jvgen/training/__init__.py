"""Training of every task: one loop over a prepared session, one step, evaluation, watchdog and preemption.

Checkpoints, optimization and telemetry are packages of their own. What is done with a trained model is in `jvgen.runs`.
"""
