"""What is done with a trained or published model: sample, evaluate, analyze, export, import.

Training itself is in `jvgen.training`.
"""
