"""One loop and one step for every task: session, program, state, evaluation, watchdog, preemption.

What is done with the result is in `jvgen.runs`.
"""
